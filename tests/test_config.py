"""Configuration: which layer overrides which, and which mistakes are refused."""

import pytest

from utils import config as configuration
from utils.config import Config, construct, known, load_config
from utils.device import pick_device
from utils.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of configurations made for the test."""
    files = {
        "datasets/d.yaml": "backbone: b\ndata: {source: x.Y}\ntrain: {epochs: 3}\n",
        "backbones/b.yaml": "encoder: {model: ViT-B-32}\n",
        "methods/m.yaml": (
            "model: {adaptor: models.clip.Clip}\noptim: {lr: 1e-3, name: adamw}\n"
            "on: {d: {optim: {weight_decay: 0.25}}}\npresets: {reference: {optim: {lr: 5e-4}}}\n"
        ),
        "methods/typo.yaml": "optim: {learning_rate: 1}\n",
        "methods/broken.yaml": "optim: {lr: [\n",
        "methods/elsewhere.yaml": "on: {x: {optim: {lr: 1}}}\n",
        "datasets/list.yaml": "[1, 2]\n",
        "datasets/bare.yaml": "data: {source: x.Y}\n",
    }
    for name, text in files.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(configuration, "HOME", tmp_path)
    return tmp_path


def test_each_layer_overrides_the_one_before(home):
    config = load_config("d", "m")
    assert (config.train.epochs, config.train.batch_size) == (3, 2048)
    assert (config.optim.lr, config.optim.name, config.optim.weight_decay) == (1e-3, "adamw", 0.25)
    assert load_config("d", "m", preset="reference").optim.lr == 5e-4
    assert load_config("d", "m", preset="reference", settings=["optim.lr=1e-2"]).optim.lr == 1e-2
    assert load_config("d", "m", objective="infonce", mean="frozen", tag="t").variant == "m+infonce+frozen+t"
    assert (config.variant, load_config("d", "m", preset="reference", tag="try").variant) == ("m", "m+reference+try")


def test_saved_configuration_reads_back_the_same(home):
    config = load_config("d", "m", seed=3, settings=["encoder.batch_size=7"])
    config.save(home / "config.yaml")
    assert Config.load(home / "config.yaml") == config


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (dict(dataset="x"), "there is no dataset 'x'; there is bare, d, list"),
        (dict(dataset="d", backbone="x"), "there is no backbone 'x'; there is b"),
        (dict(dataset="d", method="x"), "there is no method 'x'; there is broken, elsewhere, m, typo"),
        (dict(dataset="d", method="m", preset="x"), "has no preset 'x'; it has default, reference"),
        (dict(dataset="d", method="typo"), "optim has no key 'learning_rate'; it has name, lr"),
        (dict(dataset="d", method="broken"), "is not valid YAML"),
        (
            dict(dataset="d", method="m", settings=["epochs=3"]),
            "has no key 'epochs'; it has score, hubs, ordered, data",
        ),
        (dict(dataset="d", method="m", settings=["train.epochs"]), "--set takes key=value"),
        (dict(dataset="d", method="m", settings=["train.epochs=many"]), "epochs must be int, not 'many'"),
        (dict(dataset="d", method="m", settings=["train.epochs=true"]), "epochs must be int, not True"),
        (dict(dataset="d", method="m", settings=["train=3"]), "train takes the keys batch_size"),
        # A later key of the section must not hide that the first took the others away.
        (dict(dataset="d", method="m", settings=["train=3", "train.epochs=2"]), "train takes the keys batch_size"),
        (dict(dataset="d", method="m", settings=["model=null", "model.x=2"]), "model takes the keys adaptor, not None"),
        (dict(dataset="d", method="m", settings=["optim.name.x=1"]), "optim.name takes one value, not {'x': 1}"),
        (dict(dataset="d", method="m", settings=["train.epochs=2020-99-99"]), "the value is not valid YAML"),
        (dict(dataset="d", method="m", settings=["optim.lr=.inf"]), "optim.lr must be above 0 and finite, not inf"),
        (
            dict(dataset="d", method="m", settings=["optim.min_lr=1"]),
            "optim.min_lr must be between 0 and optim.lr, 0.0",
        ),
        (dict(dataset="d", method="m", settings=["optim.min_lr=-1"]), "optim.min_lr must be between 0 and optim.lr"),
        (dict(dataset="d", method="m", settings=["optim.momentum=5"]), "optim.momentum must be at least 0 and below 1"),
        (dict(dataset="d", method="m", settings=["optim.weight_decay=-1"]), "optim.weight_decay must be at least 0"),
        (dict(dataset="d", method="m", settings=["optim.weight_decay=1e9"]), r"optim.lr \* optim.weight_decay must be"),
        (dict(dataset="d", method="m", settings=["train.save_every=.nan"]), "train.save_every must be a number of sec"),
        (dict(dataset="d", method="m", settings=["train.epochs=0"]), "epochs must be at least 1"),
        (dict(dataset="d", method="m", settings=["train.epochs=["]), "the value is not valid YAML"),
        (dict(dataset="d", method="m", settings=["method=other"]), "name, not a key: give it as the flag --method"),
        (dict(dataset="d", method="m", settings=["backbone=b"]), "name, not a key: give it as the flag --backbone"),
        (dict(dataset="d", method="m", settings=["score=rank"]), "score must be log_likelihood or similarity"),
        (dict(dataset="d", method="m", objective="x"), "--objective must be native or infonce"),
        (dict(dataset="d", method="m", tag="../up"), "--tag names a folder"),
        (dict(dataset="d", method="m", tag="reference"), "would name the folder of a run with that flag"),
        (dict(dataset="d", method="m", seed=-1), "--seed must lie between 0 and"),
        (dict(dataset="d", method="m", seed=2**32), "--seed must lie between 0 and"),
        (dict(dataset="list", method="m"), "must hold keys and values"),
        (dict(dataset="bare"), "names no backbone: give one with --backbone"),
        (dict(dataset="d", method="elsewhere"), "on names 'x'; there is bare, d, list"),
    ],
)
def test_mistakes_are_named(home, call, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config(**call)


def test_options_of_a_class_are_checked():
    with pytest.raises(UserError, match="here has no key 'depth'; it has family, mean, width"):
        construct("models.asymvlm.AsymVLM", {"depth": 3}, "here", dim=4)
    with pytest.raises(UserError, match="family must be von-mises-fisher or power-spherical"):
        construct("models.asymvlm.AsymVLM", {"family": "normal"}, "here", dim=4)
    with pytest.raises(UserError, match="cannot have 3 hidden layers of width -3"):
        construct("models.asymvlm.AsymVLM", {"width": -3}, "here", dim=4)
    for nothing in ("models.nothing.Nothing", "Nothing", 3, "os.path", ""):
        with pytest.raises(UserError, match="cannot be imported"):
            construct(nothing, {}, "here")


def test_a_configuration_names_classes_of_this_suite_alone(tmp_path, monkeypatch):
    """What another module does when it is imported is done by nobody's YAML."""
    (tmp_path / "stranger.py").write_text("import os\nos.mkdir('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in ("stranger.Adaptor", "subprocess.Popen", "torch.nn.Linear", "builtins.print", "os.system"):
        with pytest.raises(UserError, match="none of this suite's modules"):
            construct(path, {}, "here")
        assert not configuration.needs_pooled(Config(model={"adaptor": path}))
    assert not (tmp_path / "ran").exists()


def test_every_shipped_configuration_resolves():
    for dataset in known("datasets"):
        for method in known("methods"):
            assert load_config(dataset, method).model["adaptor"]
    for backbone in known("backbones"):
        assert configuration.load_backbone(backbone).model


def test_a_device_that_does_not_exist_is_named():
    for name in ("cuda:99", "nonsense", "meta", "privateuseone"):
        with pytest.raises(UserError, match=f"device '{name}' does not exist here; there is cpu"):
            pick_device(name)
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
