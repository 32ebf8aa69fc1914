"""Configuration: the defaults, each commented, and what overrides them.

Defaults below <- configs/datasets/X.yaml <- configs/backbones/Y.yaml <- configs/methods/Z.yaml, its section `on: X` and
its preset <- `--set key=value`. An unknown key is an error that lists the known ones.
"""

import dataclasses
import importlib
import inspect
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from utils.errors import UserError
from utils.files import write_text

MEANS = ("frozen", "residual", "learned")  # what becomes of the frozen direction: --mean
PRECISIONS = ("auto", "float32", "float16", "bfloat16")
LEVELS = 10  # of uncertainty in an evaluation, unless it has fewer queries
FEW = 10_000  # pairs, below which an adaptor overfits long before its last epoch
HOME = Path(__file__).resolve().parent.parent
# What a run is called by: flags, never keys of a layer.
NAMES = ("dataset", "method", "preset", "objective", "mean", "tag", "seed")


@dataclass
class Data:
    source: str = ""  # class that lists the pairs, module.Class
    root: str = ""  # folder of the raw data
    train_split: str = "train"
    eval_split: str = "val"
    get: str = ""  # where the raw data is to be had, for messages
    options: dict = field(default_factory=dict)  # keyword arguments of the source


@dataclass
class Encoder:
    library: str = "open_clip"  # or transformers
    # open_clip architecture, or with its own weights hf-hub:NAME or local-dir:FOLDER; the name of a Hugging Face model
    model: str = ""
    # open_clip tag, or a weights file (of transformers: a folder) seen from here or from the suite; hub: what the model
    # names; none: random; elsewhere: not to be had here
    pretrained: str | None = None
    architecture: str | None = None  # JSON of the architecture: for open_clip to register, or config of transformers
    tokenizer: str | None = None  # Hugging Face name or folder, where it is not the model's own
    preprocess: dict = field(default_factory=dict)  # mean, std, interpolation, resize_mode, where not the weights' own
    batch_size: int = 256  # images or captions encoded at once
    precision: str = "auto"  # float32, bfloat16 or float16; auto: float16 on CUDA, else float32

    @property
    def weights_file(self):
        """Path of the weights if they are a file, or the folder of a Hugging Face or open_clip model; else None."""
        if self.model.startswith("local-dir:"):
            return Path(self.model.removeprefix("local-dir:"))
        places = [Path(self.pretrained), HOME / self.pretrained] if self.pretrained else []
        folders = self.library == "transformers"
        return next((path for path in places if path.is_file() or (folders and path.is_dir())), None)


@dataclass
class Optim:
    name: str = "sgd"  # sgd (Nesterov off) or adamw
    lr: float = 1e-2  # at the first step; cosine to min_lr at the last
    momentum: float = 0.9  # of sgd
    weight_decay: float = 5e-4
    decay_scalars: bool = False  # weight decay on one-element parameters too, as the published suites have it
    min_lr: float = 1e-6


@dataclass
class Train:
    batch_size: int = 2048  # pairs: a caption and its image
    epochs: int = 200
    min_steps: int = 10  # of an epoch, by smaller batches where pairs are few; not below 32 pairs
    val_fraction: float | None = None  # of the images, held out to pick the epoch; none: 0.1 below FEW pairs, else 0
    patience: int = 50  # epochs without a better loss of the held-out part, after which training ends
    save_every: float = 5.0  # seconds between states from which a killed run goes on


@dataclass
class Config:
    dataset: str = ""  # what is trained on
    backbone: str = ""  # the dataset's own unless given
    method: str = ""
    preset: str = "default"
    objective: str = "native"  # the method's own loss, or infonce: the unified one over its log_likelihood
    mean: str = ""  # frozen, residual or learned in place of the method's own choice
    tag: str = ""
    seed: int = 0
    score: str = "log_likelihood"  # which score ranks: log_likelihood or similarity
    ordered: bool = False  # trained on shapes, uncertainty follows true ambiguity: a Spearman of 0.8, which is tested
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    model: dict = field(default_factory=dict)  # adaptor: module.Class, and its keyword arguments
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)

    @property
    def variant(self):
        """Name a run's folder: the method, followed by what differs from its default."""
        return "+".join([self.method, *self._differs.values()])

    @property
    def _differs(self):
        """The flags in which the run differs from the method's default."""
        flags = {"preset": self.preset, "objective": self.objective, "mean": self.mean, "tag": self.tag}
        usual = {"preset": "default", "objective": "native", "mean": "", "tag": ""}
        return {name: value for name, value in flags.items() if value != usual[name]}

    @property
    def checkpoint(self):
        """Folder of the training run."""
        return Path("checkpoints", self.dataset, self.backbone, self.variant, f"seed{self.seed}")

    def result(self, evaluated_on, task):
        """Path of the result file of `task` on what is `evaluated_on`: a data set, or `dataset+split`."""
        folder = Path("results", self.dataset, self.backbone, self.variant, f"seed{self.seed}")
        return folder / f"{evaluated_on}-{task}.json"

    @property
    def flags(self):
        """The flags of train.py that name this run."""
        flags = {"dataset": self.dataset, "backbone": self.backbone, "method": self.method, "seed": self.seed}
        return flags | self._differs

    @property
    def command(self):
        """The command that trains this run, as far as names tell."""
        return "python train.py " + " ".join(f"--{name} {value}" for name, value in self.flags.items())

    def settle(self, captions):
        """Decide what is left to the number of captions trained on: whether some are held out to pick the epoch."""
        if self.train.val_fraction is None:
            self.train.val_fraction = 0.1 if captions < FEW else 0.0

    def save(self, path):
        """Write the resolved configuration as YAML."""
        write_text(path, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))

    @classmethod
    def load(cls, path):
        """Read a run's resolved configuration, as `save` wrote it; raises UserError where it is missing or damaged."""
        return _build(cls, _read(path), str(path))


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-2 as the number and `on` as the word they are; YAML 1.1 reads neither so."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not (tag.endswith(":bool") and first in "yYnNoO")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def known(kind):
    """List the names of a kind: datasets, backbones or methods. The folder is the list."""
    return sorted(path.stem for path in (HOME / "configs" / kind).glob("*.yaml"))


def presets_of(method):
    """List a method's presets."""
    return ["default", *_named("methods", method).get("presets", {})]


def contract_of(method, preset="default"):
    """Read the section `contract` of a method's YAML, overridden by its preset's: for tests/check_method.py."""
    values, where = _named("methods", method), f"configs/methods/{method}.yaml"
    chosen = _mapping(values.get("presets", {}), f"{where}: presets").get(preset, {})
    contract = {}
    for layer in (values, _mapping(chosen, where)):
        _merge(contract, _mapping(layer.get("contract", {}), f"{where}: contract"))
    return contract


def load_backbone(name):
    """Resolve one backbone's Encoder; raises what `load_config` raises."""
    return _build(Encoder, _named("backbones", name).get("encoder", {}), f"configs/backbones/{name}.yaml: encoder")


def load_config(
    dataset, method=None, backbone=None, preset="default", objective="native", mean="", tag="", seed=0, settings=()
):
    """Resolve a Config; raises UserError for an unknown name, preset or key and for a value that cannot be.

    settings: strings `key=value` with dotted keys, applied last.
    """
    values = _named("datasets", dataset)
    backbone = backbone or values.get("backbone")
    if not backbone:
        raise UserError(f"configs/datasets/{dataset}.yaml names no backbone: give one with --backbone.")
    layers = [_named("backbones", backbone)]
    if method:
        own = _named("methods", method)
        where = f"configs/methods/{method}.yaml"
        presets, on, _ = (_mapping(own.pop(name, {}), f"{where}: {name}") for name in ("presets", "on", "contract"))
        if preset not in ("default", *presets):
            raise UserError(f"method '{method}' has no preset '{preset}'; it has {', '.join(['default', *presets])}.")
        if tag in (*presets, "infonce", *MEANS):
            raise UserError(f"--tag {tag} would name the folder of a run with that flag: choose another.")
        unknown = set(on) - set(known("datasets"))
        if unknown:
            raise UserError(f"{where}: on names '{unknown.pop()}'; there is {', '.join(known('datasets'))}.")
        chosen = _mapping(presets.get(preset, {}), where)
        chosen.pop("contract", None)  # not part of a run's configuration, see `contract_of`
        layers += [own, _mapping(on.get(dataset, {}), f"{where}: on"), chosen]
    layers += [{"model": {"mean": mean}}] if mean else []
    layers += [{"score": "log_likelihood"}] if objective == "infonce" else []  # what that objective trains
    layers += [_setting(text) for text in settings]
    for layer in layers:
        named = [name for name in (*NAMES, "backbone") if name in layer]
        if named:
            raise UserError(f"{named[0]} names the run and is no key of its configuration: give it as a flag.")
        _merge(values, layer)
    flags = dict(preset=preset, objective=objective, mean=mean, tag=tag, seed=seed)
    _merge(values, dict(dataset=dataset, backbone=backbone, method=method or "") | flags)
    config = _build(Config, values, f"the configuration of {method or dataset}")
    _check(config)
    return config


def _setting(text):
    """Turn `a.b=value` into {"a": {"b": value}}."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set wants key=value, not '{text}'; for example --set train.epochs=10.")
    try:
        nested = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: the value is not valid YAML.") from None
    for name in reversed(key.split(".")):
        nested = {name: nested}
    return nested


def _check(config):
    """Raise a UserError for a value of the right type that cannot be."""
    if config.tag and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", config.tag):
        raise UserError(f"--tag names a folder: letters, digits, '.', '_' and '-', not '{config.tag}'.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--seed must lie between 0 and {2**32 - 1}, not {config.seed}.")
    if config.objective not in ("native", "infonce"):
        raise UserError(f"--objective must be native or infonce, not '{config.objective}'.")
    if config.mean not in ("", *MEANS):
        raise UserError(f"--mean must be {', '.join(MEANS[:-1])} or {MEANS[-1]}, not '{config.mean}'.")
    if config.encoder.precision not in PRECISIONS:
        said = f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        raise UserError(f"encoder.precision must be {said}, not '{config.encoder.precision}'.")
    if config.score not in ("log_likelihood", "similarity"):
        raise UserError(f"score must be log_likelihood or similarity, not '{config.score}'.")
    train = config.train
    if train.val_fraction is not None and not 0 <= train.val_fraction < 1:
        raise UserError(f"train.val_fraction must lie in [0, 1), not {train.val_fraction}.")
    counts = {"train.batch_size": train.batch_size, "train.epochs": train.epochs}
    counts |= {"train.patience": train.patience, "train.min_steps": train.min_steps}
    for name, value in (counts | {"encoder.batch_size": config.encoder.batch_size}).items():
        if not 1 <= value < 2**31:
            raise UserError(f"{name} must be at least 1 and below {2**31:,}, not {value}.")


def needs_pooled(config):
    """Whether the adaptor that `config` names is fed what goes into the towers' last maps, too."""
    module, _, name = str(config.model.get("adaptor", "")).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name).pooled
    except (ImportError, AttributeError, TypeError, ValueError):
        return False  # what constructs it will say so


def construct(path, options, where, **given):
    """Import `module.Class` and call it with `given` and `options`.

    Raises UserError for a class that cannot be imported, an option it does not take, and a value it refuses.
    """
    module, _, name = str(path).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
        takes = [name for name in inspect.signature(cls).parameters if name not in given]
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where} names the class '{path}', which cannot be imported ({error}).") from None
    unknown = [name for name in options if name not in takes]
    if unknown:
        raise UserError(f"{where} has no key '{unknown[0]}'; it has {', '.join(takes) or 'none'}.")
    try:
        return cls(**given, **options)
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    return _mapping(values, path)


def _mapping(values, where):
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold keys and values, not {values!r}.")
    return values


def _merge(values, layer):
    for name, value in layer.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def _build(cls, values, where):
    """Fill a dataclass from nested dicts, checking names and types."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    filled = {}
    if not isinstance(values, dict):
        raise UserError(f"{where} wants the keys {', '.join(fields)}, not {values!r}.")
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
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise UserError(f"{where}: {name} must be {getattr(kind, '__name__', kind)}, not {value!r}.")
        filled[name] = value
    return cls(**filled)


def difference(held, wanted, prefix=""):
    """Dotted names of the values in which two nested dicts differ."""
    names = []
    for name in dict.fromkeys([*held, *wanted]):
        a, b = held.get(name), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += difference(a, b, f"{prefix}{name}.")
        elif a != b:
            names.append(prefix + name)
    return names
