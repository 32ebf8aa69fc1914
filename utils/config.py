"""Configuration: the commented defaults and what overrides them.

Defaults below <- configs/datasets/X.yaml <- configs/backbones/Y.yaml <- configs/methods/Z.yaml, its section `on: X` and
its preset <- `--set key=value`. An unknown key is an error that lists the known ones.
"""

import dataclasses
import importlib.util
import inspect
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from utils.errors import UserError, one_of
from utils.files import UNREADABLE, write_text

MEANS = ("frozen", "residual", "learned")  # how the mean follows from the frozen direction: --mean
HUBS = ("auto", "none", "nnn", "inverted-softmax")  # metrics/hubs.py
PRODUCTS = ("float32", "tf32", "bfloat16")  # what training computes matrix products in, see models/precision.py
PRECISIONS = ("auto", "float32", "float16", "bfloat16")
SCORES = ("log_likelihood", "similarity")
FOLLOWED = ("query", "retrieved", "sum")  # what levels follow: the query's uncertainty, its answer's, or their sum
LEVELS = 10  # uncertainty levels of an evaluation; no more than it has queries
FEW = 10_000  # with fewer pairs than this an adaptor overfits long before its last epoch
HOME = Path(__file__).resolve().parent.parent
CODE = HOME, HOME / "tests"  # folders of the modules and packages whose classes a configuration may name
# The parts of a run's name: set by flags, never by a key.
NAMES = ("dataset", "method", "preset", "objective", "mean", "tag", "seed")


@dataclass
class Data:
    source: str = ""  # class that lists the pairs, module.Class
    root: str = ""  # folder of the raw data
    train_split: str = "train"
    eval_split: str = "val"
    get: str = ""  # where to get the raw data, for error messages
    options: dict = field(default_factory=dict)  # keyword arguments of the source


@dataclass
class Encoder:
    library: str = "open_clip"  # or transformers
    # open_clip: an architecture, or hf-hub:NAME or local-dir:FOLDER, which include the weights; transformers: a model
    model: str = ""
    # open_clip tag, or weights: a file (transformers: a folder), relative to the working folder or to the suite; hub:
    # the model's own; none: random; elsewhere: only embeddings of this model are at hand
    pretrained: str | None = None
    architecture: str | None = None  # JSON file: an architecture for open_clip, or a configuration of transformers
    tokenizer: str | None = None  # Hugging Face name or folder; none: the model's own
    preprocess: dict = field(default_factory=dict)  # mean, std, interpolation, resize_mode; by default the weights' own
    batch_size: int = 256  # images or captions encoded at once
    precision: str = "auto"  # float32, bfloat16 or float16; auto: float16 on CUDA, else float32

    @property
    def weights_file(self):
        """Path of the weights, a file or the folder of a Hugging Face or open_clip model; None if not on this disk."""
        if self.model.startswith("local-dir:"):
            return Path(self.model.removeprefix("local-dir:"))
        paths = [Path(self.pretrained), HOME / self.pretrained] if self.pretrained else []
        may_be_folder = self.library == "transformers"
        return next((path for path in paths if path.is_file() or (may_be_folder and path.is_dir())), None)


@dataclass
class Optim:
    name: str = "sgd"  # sgd (Nesterov off) or adamw
    lr: float = 1e-2  # learning rate of the first step; decays as a cosine to min_lr
    momentum: float = 0.9  # sgd only
    weight_decay: float = 5e-4
    decay_scalars: bool = False  # weight decay on one-element parameters, too, as in the published suites
    min_lr: float = 1e-6


@dataclass
class Train:
    batch_size: int = 2048  # pairs: a caption and its image
    epochs: int = 200
    min_steps: int = 10  # steps per epoch at least: few pairs make smaller batches, down to 32 pairs
    val_fraction: float | None = None  # of images held out to pick the epoch; none: 0.1 below FEW pairs, else 0
    patience: int = 50  # training stops after so many epochs without a better held-out loss
    precision: str = "float32"  # of matrix products: tf32; bfloat16: of perceptrons alone
    deterministic: bool = False  # the same bits each time on CUDA, too, in training and evaluation; slower
    compile: bool = False  # the loss by torch.compile, on CUDA as graphs; rounds differently
    in_memory: bool | None = None  # false: read from disk in shuffled blocks; none: if half the memory is too small
    save_every: float = 5.0  # seconds between saved states at ends of epochs; within one, a minute passes at least


@dataclass
class Config:
    dataset: str = ""  # the training data
    backbone: str = ""  # by default the one that the dataset names
    method: str = ""
    preset: str = "default"
    objective: str = "native"  # the method's own loss, or infonce: unified InfoNCE of its log_likelihood
    mean: str = ""  # frozen, residual or learned; empty: the method's own choice
    tag: str = ""
    seed: int = 0
    score: str = "log_likelihood"  # the score that ranks: log_likelihood or similarity
    hubs: str = "none"  # correction of scores in retrieval, as in eval.py: auto, nnn or inverted-softmax
    ordered: bool = False  # tested claim: on shapes, uncertainty and true ambiguity have a Spearman of at least 0.8
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    model: dict = field(default_factory=dict)  # adaptor: module.Class, and its keyword arguments
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)

    @property
    def variant(self):
        """Name of the run's folder: the method and each flag that differs from its default, joined by `+`."""
        return "+".join([self.method, *self._changed_flags.values()])

    @property
    def _changed_flags(self):
        """The flags of the run that differ from their defaults."""
        flags = {"preset": self.preset, "objective": self.objective, "mean": self.mean, "tag": self.tag}
        defaults = {"preset": "default", "objective": "native", "mean": "", "tag": ""}
        return {name: value for name, value in flags.items() if value != defaults[name]}

    @property
    def checkpoint(self):
        """Folder of the training run."""
        return Path("checkpoints", self.dataset, self.backbone, self.variant, f"seed{self.seed}")

    def result(self, evaluated_on, task):
        """Path of the result file of `task`; evaluated_on: a data set, or `dataset+split`."""
        folder = Path("results", self.dataset, self.backbone, self.variant, f"seed{self.seed}")
        return folder / f"{evaluated_on}-{task}.json"

    @property
    def flags(self):
        """The flags of train.py that name this run."""
        flags = {"dataset": self.dataset, "backbone": self.backbone, "method": self.method, "seed": self.seed}
        return flags | self._changed_flags

    @property
    def command(self):
        """The command that trains this run, without its --set."""
        return "python train.py " + " ".join(f"--{name} {value}" for name, value in self.flags.items())

    def settle(self, captions):
        """Set a missing train.val_fraction, whose default depends on the number of training captions."""
        if self.train.val_fraction is None:
            self.train.val_fraction = 0.1 if captions < FEW else 0.0

    def save(self, path):
        """Write the resolved configuration as YAML."""
        write_text(path, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))

    @classmethod
    def load(cls, path):
        """Read a configuration that `save` wrote; raises UserError if it is missing or damaged."""
        config = _build(cls, _read(path), str(path))
        try:
            _check(config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return config


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # libyaml, where PyYAML has it, is ten times as fast
    """YAML that reads 1e-2 as a number and `on` as a string; YAML 1.1 reads a string and a boolean."""


# Without the booleans of YAML 1.1 that begin with y, n or o.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not (tag.endswith(":bool") and first in "yYnNoO")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def known(kind):
    """List the names of a kind, `datasets`, `backbones` or `methods`: the YAML files in its folder of configs/."""
    return sorted(path.stem for path in (HOME / "configs" / kind).glob("*.yaml"))


def presets_of(method):
    """List a method's presets."""
    return ["default", *_named("methods", method).get("presets", {})]


def evaluated_as(dataset, split, usual):
    """Name of what a result is of: the data set, and the split unless it is the `usual` one."""
    return dataset if split == usual else f"{dataset}+{split}"


def contract_of(method, preset="default"):
    """Read the section `contract` of a method's YAML, overridden by its preset's: for tests/check_method.py."""
    values, where = _named("methods", method), f"configs/methods/{method}.yaml"
    chosen = _mapping(values.get("presets", {}), f"{where}: presets").get(preset, {})
    contract = {}
    for layer in (values, _mapping(chosen, where)):
        _merge(contract, _mapping(layer.get("contract", {}), f"{where}: contract"))
    return contract


def load_backbone(name):
    """Resolve the Encoder of a backbone; raises UserError as `load_config` does."""
    return _build(Encoder, _named("backbones", name).get("encoder", {}), f"configs/backbones/{name}.yaml: encoder")


def load_config(
    dataset, method=None, backbone=None, preset="default", objective="native", mean="", tag="", seed=0, settings=()
):
    """Resolve a Config; raises UserError for an unknown name, preset or key and for an invalid value.

    settings: strings `key=value` with dotted keys, applied last.
    """
    values = dataclasses.asdict(Config())
    _merge(values, _named("datasets", dataset))
    backbone = backbone or values.get("backbone")
    if not backbone:
        raise UserError(f"configs/datasets/{dataset}.yaml names no backbone: give one with --backbone.")
    layers = [_named("backbones", backbone)]
    if method:
        where = f"configs/methods/{method}.yaml"
        of_method = _named("methods", method)
        presets = _mapping(of_method.pop("presets", {}), f"{where}: presets")
        on = _mapping(of_method.pop("on", {}), f"{where}: on")
        if preset not in ("default", *presets):
            raise UserError(f"method '{method}' has no preset '{preset}'; it has {', '.join(['default', *presets])}.")
        if tag in (*presets, "infonce", *MEANS):
            raise UserError(f"--tag {tag} would name the folder of a run with that flag: choose another.")
        unknown = set(on) - set(known("datasets"))
        if unknown:
            raise UserError(f"{where}: on names '{unknown.pop()}'; there is {', '.join(known('datasets'))}.")
        of_preset = _mapping(presets.get(preset, {}), where)
        for layer in (of_method, of_preset):
            layer.pop("contract", None)  # no part of a run's configuration, see `contract_of`
        layers += [of_method, _mapping(on.get(dataset, {}), f"{where}: on"), of_preset]
    if mean:
        layers.append({"model": {"mean": mean}})
    if objective == "infonce":
        layers.append({"score": "log_likelihood"})  # the score that this objective trains
    layers += [setting(text) for text in settings]
    for layer in layers:
        named = [name for name in (*NAMES, "backbone") if name in layer]
        if named:
            raise UserError(f"{named[0]} is part of the run's name, not a key: give it as the flag --{named[0]}.")
        _merge(values, layer)
    flags = dict(preset=preset, objective=objective, mean=mean, tag=tag, seed=seed)
    _merge(values, dict(dataset=dataset, backbone=backbone, method=method or "") | flags)
    config = _build(Config, values, f"the configuration of {method or dataset}")
    _check(config)
    return config


def setting(text, flag="--set", example="train.epochs=10"):
    """Turn `a.b=value` into {"a": {"b": value}}; raises UserError, which names the flag, for anything else."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{flag} takes key=value, not '{text}'; for example {flag} {example}.")
    try:
        nested = yaml.load(value, _Loader)
    except (yaml.YAMLError, *UNREADABLE):  # a date of no calendar; brackets without an end
        raise UserError(f"{flag} {text}: the value is not valid YAML.") from None
    for name in reversed(key.split(".")):
        nested = {name: nested}
    return nested


def _check(config):
    """Raise UserError for a value that has the right type but is invalid."""
    if config.tag and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", config.tag):
        raise UserError(f"--tag names a folder: use letters, digits, '.', '_' and '-', not '{config.tag}'.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--seed must lie between 0 and {2**32 - 1}, not {config.seed}.")
    one_of("--objective", config.objective, ("native", "infonce"), UserError)
    if config.mean:
        one_of("--mean", config.mean, MEANS, UserError)
    one_of("encoder.precision", config.encoder.precision, PRECISIONS, UserError)
    one_of("train.precision", config.train.precision, PRODUCTS, UserError)
    one_of("score", config.score, SCORES, UserError)
    one_of("hubs", config.hubs, HUBS, UserError)
    train, optim = config.train, config.optim
    decay = optim.lr * optim.weight_decay  # share of the weights that a step takes away
    for name, value, fits, limits in (
        ("optim.lr", optim.lr, 0 < optim.lr < math.inf, "above 0 and finite"),
        ("optim.min_lr", optim.min_lr, 0 <= optim.min_lr <= optim.lr, f"between 0 and optim.lr, {optim.lr}"),
        ("optim.momentum", optim.momentum, 0 <= optim.momentum < 1, "at least 0 and below 1"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "at least 0"),
        ("optim.lr * optim.weight_decay", decay, decay < 1, "below 1"),
        ("train.save_every", train.save_every, train.save_every >= 0, "a number of seconds"),
    ):
        if not fits:
            raise UserError(f"{name} must be {limits}, not {value}.")
    if train.val_fraction is not None and not 0 <= train.val_fraction < 1:
        raise UserError(f"train.val_fraction must lie in [0, 1), not {train.val_fraction}.")
    counts = {"train.batch_size": train.batch_size, "train.epochs": train.epochs}
    counts |= {"train.patience": train.patience, "train.min_steps": train.min_steps}
    for name, value in (counts | {"encoder.batch_size": config.encoder.batch_size}).items():
        if not 1 <= value < 2**31:
            raise UserError(f"{name} must be at least 1 and below {2**31:,}, not {value}.")


def needs_pooled(config):
    """Whether the adaptor that `config` names needs pooled features, the inputs of the towers' last linear maps."""
    try:
        return _class(config.model.get("adaptor", "")).pooled
    except (ImportError, AttributeError, TypeError, ValueError):
        return False  # `construct` reports it


def _class(path):
    """Import `module.Class` of this suite; of nothing else, as a stranger's configuration may name anything."""
    module, _, name = str(path).rpartition(".")
    spec = importlib.util.find_spec(module.partition(".")[0])
    place = Path(spec.origin) if spec and spec.origin else Path()
    if (place.parent.parent if spec and spec.submodule_search_locations else place.parent) not in CODE:
        raise ImportError("it is none of this suite's modules")
    return getattr(importlib.import_module(module), name)


def construct(path, options, where, **arguments):
    """Import `module.Class` and call it with `arguments` and `options`.

    Raises UserError for a class that cannot be imported, an option it does not take, and a value it refuses.
    """
    try:
        cls = _class(path)
        accepted = [name for name in inspect.signature(cls).parameters if name not in arguments]
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where} names the class '{path}', which cannot be imported ({error}).") from None
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise UserError(f"{where} has no key '{unknown[0]}'; it has {', '.join(accepted) or 'none'}.")
    try:
        return cls(**arguments, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}.") from None


def make_adaptor(config, dim):
    """Construct the adaptor that `config` names, for embeddings of size `dim`; raises what `construct` raises."""
    options = {name: value for name, value in config.model.items() if name != "adaptor"}
    return construct(config.model.get("adaptor", ""), options, f"the model of method '{config.method}'", dim=dim)


def make_source(config):
    """Construct the source of pairs that `config` names; raises what `construct` raises."""
    data = config.data
    where = f"configs/datasets/{config.dataset}.yaml: data.options"
    source = construct(data.source, data.options, where, root=data.root)
    source.get = data.get
    return source


def _named(kind, name):
    path = HOME / "configs" / kind / f"{name}.yaml"
    if name not in known(kind):
        raise UserError(f"there is no {kind[:-1]} '{name}'; there is {', '.join(known(kind))}.")
    return _read(path)


def _read(path):
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except OSError:
        raise
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    return _mapping(values, path)


def _mapping(values, where):
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold keys and values, not {values!r}.")
    return values


def _merge(values, layer, section=""):
    """Override nested dicts `values` in place by those of `layer`; raises UserError where only one has a section."""
    for name, value in layer.items():
        if name in values and isinstance(value, dict) != isinstance(values[name], dict):
            keys = (
                f"the keys {', '.join(values[name]) or 'of its class'}"
                if isinstance(values[name], dict)
                else "one value"
            )
            raise UserError(f"{section}{name} takes {keys}, not {value!r}.")
        if isinstance(value, dict) and name in values:
            _merge(values[name], value, f"{section}{name}.")
        else:
            values[name] = value


def _build(cls, values, where):
    """Fill a dataclass from nested dicts, checking names and types."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    filled = {}
    if not isinstance(values, dict):
        raise UserError(f"{where} takes the keys {', '.join(fields)}, not {values!r}.")
    for name, value in values.items():
        if name not in fields:
            keys = [key for key in fields if key not in (*NAMES, "backbone")]
            raise UserError(f"{where} has no key '{name}'; it has {', '.join(keys)}.")
        kind = types[name]
        if dataclasses.is_dataclass(kind):
            filled[name] = _build(kind, value, f"{where}: {name}")
            continue
        if kind in (float, float | None) and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind not in (bool, bool | None) and isinstance(value, bool)):
            raise UserError(f"{where}: {name} must be {getattr(kind, '__name__', kind)}, not {value!r}.")
        filled[name] = value
    return cls(**filled)


def completed(values):
    """The nested values of a Config of an earlier version with the keys that it lacked: their defaults do as it did."""
    return dataclasses.asdict(_build(Config, values, "a saved configuration"))


def difference(saved, wanted, prefix=""):
    """List the dotted names of the values in which two nested dicts differ."""
    names = []
    for name in dict.fromkeys([*saved, *wanted]):
        a, b = saved.get(name), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += difference(a, b, f"{prefix}{name}.")
        elif a != b:
            names.append(prefix + name)
    return names
