"""The contract itself: README's example keeps it, and each way to break it is named by one check in one line."""

import dataclasses
import random
import re

import check_method
import pytest
import torch
import torch.nn.functional as F
from check_method import CHECKS, DIM, Case, main, run_contract
from pages import README, blocks
from torch import nn

import models
from models.backbones.last_map import cut
from models.base import Adaptor, Embedding, Mean
from utils.config import HOME, Config, load_config
from utils.device import pick_device

SOUND = "contract: {wider: {log_variance: raised}}\n"
FAULTS = []


def with_excuse(excuse):
    return f"contract: {{wider: {{log_variance: raised}}, {excuse}}}\n"


def breaks(check, saw, text=SOUND):
    """List a class whose YAML ends in `text` as a method that fails one check, whose line matches `saw`."""

    def list_class(cls):
        FAULTS.append((cls.__name__, text, check, saw))
        return cls

    return list_class


@pytest.fixture
def home(tmp_path, monkeypatch, request):
    """A suite whose configs have no method yet."""
    (tmp_path / "configs" / "methods").mkdir(parents=True)
    for kind in ("datasets", "backbones"):
        (tmp_path / "configs" / kind).symlink_to(HOME / "configs" / kind)
    monkeypatch.setattr("utils.config.HOME", tmp_path)
    monkeypatch.setattr(check_method, "small_world", lambda: request.getfixturevalue("small_world"))
    return tmp_path


def write_method(home, adaptor, text):
    """Write configs/methods/mine.yaml for a class of this file."""
    path = home / "configs" / "methods" / "mine.yaml"
    path.write_text(f"model: {{adaptor: test_check_method.{adaptor}}}\noptim: {{name: adamw, lr: 1e-3}}\n{text}")


def write_readme_example(home, monkeypatch):
    """Write the two files of README's example method where they belong in a suite of its own."""
    written = [block.write(home) for block in blocks(README) if block.file]
    assert written == [home / "models/mine.py", home / "configs/methods/mine.yaml"]
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(home / "models")])


def failures(preset="default"):
    """Run the contract on the written method; returns the checks that fail."""
    return [name for name, verdict, _ in run_contract(Case("mine", preset)) if verdict == "FAILED"]


def test_readme_example_keeps_the_contract_as_typed(home, monkeypatch, capsys):
    write_readme_example(home, monkeypatch)
    assert main(["mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split()[2]: line.split(maxsplit=3)[3] for line in lines}
    assert list(verdicts) == list(CHECKS)
    applies = set(CHECKS) - {"device", "means", "sign", "ordered"}
    assert {verdicts[name] for name in applies} == {"ok"}
    assert verdicts["means"] == "does not apply: it has no option 'mean'"


class Sound(Adaptor):
    """Captions with one variance each, which widens their softmax; it keeps the whole contract."""

    def __init__(self, dim: int):
        super().__init__(temperature="exp")
        self.log_variance = nn.Linear(dim, 1)

    def direction(self, text):
        return F.normalize(text, dim=-1)

    def uncertainty(self, text):
        return self.log_variance(self.direction(text)).squeeze(-1).exp()

    def adapt_text(self, text):
        return Embedding(self.direction(text), self.uncertainty(text))

    def log_likelihood(self, image, text):
        return self.similarity(image, text) / text.uncertainty


def test_sound_method_keeps_the_contract(home):
    write_method(home, "Sound", SOUND)
    assert failures() == []


class DividesByTheOne(Sound):
    """It reads pooled rows, whose last column is 1 whatever the length of an embedding."""

    pooled = True

    def direction(self, text):
        return super().direction(cut(text, DIM)[0])

    def uncertainty(self, text):
        return super().uncertainty(text) / text[:, -1]

    def adapt_image(self, image):
        return super().adapt_image(cut(image, DIM)[0])


def test_lengths_change_but_the_one_of_pooled_rows_stays(home):
    write_method(home, "DividesByTheOne", SOUND)
    assert failures() == []


@breaks("shapes", r"uncertainty of captions \(13, 1\) instead of \(13,\)")
class ColumnOfUncertainties(Sound):
    def adapt_text(self, text):
        return Embedding(self.direction(text), self.uncertainty(text)[:, None])

    def log_likelihood(self, image, text):
        return self.similarity(image, text) / text.uncertainty.squeeze(-1)


@breaks("shapes", r"log_likelihood \(13, 9\) instead of \(9, 13\)")
class ScoresTransposed(Sound):
    def log_likelihood(self, image, text):
        return super().log_likelihood(image, text).T


@breaks("shapes", "compared_answers 0 and `of_candidates`")
class ComparesWithoutANumber(Sound):
    def of_candidates(self, query, answers, side):
        return {"information": query.uncertainty}


@breaks("finite", "uncertainty of captions, log_likelihood, classify not finite")
class LogOfNegative(Sound):
    def uncertainty(self, text):
        return (-super().uncertainty(text)).log()


@breaks("zero", "mean of captions, uncertainty of captions, similarity and 2 more not finite")
class DividesByLength(Sound):
    def direction(self, text):
        return text / text.norm(dim=-1, keepdim=True)


@breaks("tiny", "uncertainty of captions not finite")
class DividesByShortLength(Sound):
    def uncertainty(self, text):
        length = text.norm(dim=-1)
        return super().uncertainty(text) + torch.where(length > 0, 1 / length, 0).exp()


@breaks("huge", "uncertainty of captions not finite")
class ExpOfLength(Sound):
    def uncertainty(self, text):
        return super().uncertainty(text) + (text.norm(dim=-1) / 100).exp()


@breaks("independent", "log_likelihood differs in 9 of 9 values")
class SoftmaxOverGallery(Sound):
    def log_likelihood(self, image, text):
        return super().log_likelihood(image, text).log_softmax(dim=1)


@breaks("independent", "mean of captions differs in 72 of 72 values")
class CentersTheBatch(Sound):
    def direction(self, text):
        return F.normalize(text - text.mean(dim=0), dim=-1)


@breaks("state", "uncertainty of captions differs in 13 of 13 values")
class PlainTensor(Sound):
    def __init__(self, dim: int):
        super().__init__(dim)
        self.offset = torch.randn(dim)

    def uncertainty(self, text):
        return self.log_variance(self.direction(text) + self.offset.to(text)).squeeze(-1).exp()


@breaks("state", "uncertainty of captions differs in 13 of 13 values")
class RunningMean(Sound):
    """It is not saved, and training moves it."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.register_buffer("center", torch.zeros(dim), persistent=False)

    def loss(self, image, text):
        self.center = text.mean(dim=0)
        return super().loss(image, text)

    def uncertainty(self, text):
        return self.log_variance(self.direction(text - self.center)).squeeze(-1).exp()


@breaks("float64", "uncertainty of captions is torch.float32")
class OnlyFloat32(Sound):
    def uncertainty(self, text):
        return super().uncertainty(text).float()


@breaks("device", "uncertainty of captions lies on cpu")
class StaysOnTheCPU(Sound):
    def adapt_text(self, text):
        return Embedding(self.direction(text), self.uncertainty(text).cpu())

    def log_likelihood(self, image, text):
        return self.similarity(image, text) / text.uncertainty.to(text.mean.device)


@breaks("gradients", "loss gives none to log_variance.weight, log_variance.bias")
class Detached(Sound):
    def uncertainty(self, text):
        return super().uncertainty(text).detach()


@breaks("learns", "loss ends at .*, and again at")
class UnseededNoise(Sound):
    def loss(self, image, text):
        return super().loss(image, text) + 1e-5 * random.random()


@breaks("learns", "loss goes from .* to ")
class RewardsMistakes(Sound):
    """Its optimizer goes down where the reported loss goes up."""

    def loss(self, image, text):
        loss = super().loss(image, text)
        return 2 * loss.detach() - loss


@breaks("means", "with --mean frozen and loss means of captions move")
class AnyMeanIsResidual(Sound):
    def __init__(self, dim: int, mean: str = "residual"):
        super().__init__(dim)
        self.text_mean = Mean("residual", dim, 8, 1)

    def adapt_text(self, text):
        return Embedding(self.text_mean(text), self.uncertainty(text))


@breaks("means", "with --mean frozen and loss means of images move")
class AnyMeanOfImagesIsResidual(Sound):
    def __init__(self, dim: int, mean: str = "residual"):
        super().__init__(dim)
        self.image_mean, self.text_mean = Mean("residual", dim, 8, 1), Mean(mean, dim, 8, 1)

    def adapt_image(self, image):
        return Embedding(self.image_mean(image))

    def adapt_text(self, text):
        return Embedding(self.text_mean(text), self.uncertainty(text))


@breaks("sign", "it rises for 0 of 13 captions")
class Precision(Sound):
    def uncertainty(self, text):
        return 1 / super().uncertainty(text)


@breaks("sign", "a learned uncertainty, and no `contract", text="")
class LearnsInPrepare(Adaptor):
    def __init__(self, dim: int):
        super().__init__(temperature="exp")
        self.register_buffer("mean_length", torch.zeros(()))

    def prepare(self, pairs, bank, quiet=False):
        self.mean_length.fill_(torch.as_tensor(pairs.text).norm(dim=-1).mean())

    def adapt_text(self, text):
        return super().adapt_text(text)._replace(uncertainty=text.norm(dim=-1) / self.mean_length)


@breaks("ordered", r"-0\.\d+, an order upside down", "ordered: true\n")
class ShortIsUncertain(Adaptor):
    """On `shapes` vague captions have long embeddings: this order is upside down."""

    def __init__(self, dim: int):
        super().__init__(temperature="exp")

    def adapt_text(self, text):
        return super().adapt_text(text)._replace(uncertainty=-text.norm(dim=-1))


FAULTS += [
    ("Missing", SOUND, "constructs", "cannot be imported"),
    ("Sound", "train: {epochs: many}\n", "constructs", "epochs must be int, not 'many'"),
    ("Sound", "", "sign", "a learned uncertainty, and no `contract"),
    ("Sound", "contract: {wider: {heads: raised}}\n", "sign", "has no attribute 'heads'"),
    ("Sound", with_excuse("zero: divides by the length"), "zero", r"\(divides by the length\), but it passes"),
]


@pytest.mark.parametrize(("adaptor", "text", "check", "saw"), FAULTS, ids=[f"{f[0]}-{f[2]}" for f in FAULTS])
def test_each_fault_is_named_by_one_check_in_one_line(home, capsys, adaptor, text, check, saw):
    write_method(home, adaptor, text)
    if check == "device" and pick_device().type == "cpu":
        pytest.skip("this machine has no accelerator")
    assert main(["mine"]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert line.split()[2] == check and re.search(saw, line), line


def test_a_reason_in_the_yaml_excuses_a_check_that_fails(home, capsys):
    write_method(home, "ExpOfLength", with_excuse("huge: its exp overflows"))
    assert main(["mine"]) == 0
    assert re.search("huge +does not apply: its exp overflows\n", capsys.readouterr().out)


def test_a_preset_has_its_own_excuses(home, capsys):
    text = f"{SOUND}presets: {{long: {{contract: {{huge: its exp overflows}}}}}}\n"
    write_method(home, "ExpOfLength", text)
    assert failures() == ["huge"] and failures("long") == []


@pytest.mark.parametrize(
    ("arguments", "contract", "sentence"),
    [
        (["other"], "{}", "there is no method 'other'; there is mine."),
        (["mine", "--preset", "other"], "{}", "--preset must be default, not 'other'."),
        (["mine"], "{speed: slow}", "mine.yaml: contract has no key 'speed'; it has wider, constructs, shapes"),
        (["mine"], "{zero: true}", "contract: zero must be the reason why it does not apply, not True."),
        (["mine"], "{wider: {log_variance: up}}", "log_variance must be raised, lowered, doubled or halved, not 'up'."),
        (["mine"], "{wider: head}", "contract: wider must hold names and changes, not 'head'."),
        (["mine"], "[zero]", "contract must hold keys and values"),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_2(home, refusal, arguments, contract, sentence):
    write_method(home, "Sound", f"contract: {contract}\n")
    assert sentence in refusal(main, *arguments)


def test_the_contract_is_no_part_of_a_runs_configuration(home):
    write_method(home, "Sound", "presets: {other: {model: {}}}\n")
    plain = [dataclasses.asdict(load_config("shapes", "mine", preset=preset)) for preset in ("default", "other")]
    write_method(home, "Sound", f"{SOUND}presets: {{other: {{contract: {{sign: none}}}}}}\n")
    configs = [load_config("shapes", "mine", preset=preset) for preset in ("default", "other")]
    assert [dataclasses.asdict(config) for config in configs] == plain
    configs[0].save(home / "config.yaml")
    assert "contract" not in (home / "config.yaml").read_text()
    assert Config.load(home / "config.yaml") == configs[0]
