"""What benchmarks/densities.py asks: captions of absent things, hidden pairs, and densities whose truth is known."""

import re

import numpy as np
import pytest
import torch
from test_vmf_mixture import mean_over_sphere, unit

from benchmarks import densities
from datasets.embeddings import Pairs
from datasets.shapes import ATTRIBUTES, NAMES, UNNAMED, VALUES, describe
from utils.config import load_config


def test_absent_things_replace_one_wording():
    """One wording of one attribute becomes a word that no caption of the world has, with its article."""
    rng = np.random.default_rng(0)
    mentions = np.stack([rng.integers(len(values), size=300) for values in VALUES], axis=1)
    mentions[rng.random(mentions.shape) < 0.5] = UNNAMED
    texts = [describe(mention, rng) for mention in mentions]
    rows, changed = densities.renamed(texts, mentions)
    named = (mentions[:, [NAMES.index(name) for name in densities.ABSENT]] != UNNAMED).any(axis=1)
    assert (rows == np.flatnonzero(named)).all()
    known = {word for values in ATTRIBUTES.values() for wordings in values.values() for word in wordings}
    absent = {word for words in densities.ABSENT.values() for word in words}
    assert not known & absent
    for row, text in zip(rows, changed, strict=True):
        [new] = absent & set(text.split())
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        assert len(set(text.split()) ^ set(texts[row].split())) <= 4, (text, texts[row])
        assert new not in texts[row]


def test_hidden_pairs_are_of_shape_and_color():
    scenes = np.array([[0, 1, 2, 0, 0], [0, 2, 2, 0, 0], [2, 7, 0, 0, 0], [0, UNNAMED, 0, 0, 0], [UNNAMED, 1, 0, 0, 0]])
    assert densities.hidden(scenes).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("name", densities.KNOWN)
def test_known_densities_are_normalized(name):
    x, truth = densities.known(name, 3)
    assert x.shape == (densities.ITEMS + densities.ASKED, 3)
    assert mean_over_sphere(truth, 3, unit(1, 3), 1.0) == pytest.approx(1, abs=0.03)
    # The mean over samples of p of 1 / p, which is the share of the sphere: 1.
    assert (-truth(x)).exp().mean() == pytest.approx(1, abs=0.1 if name == "uniform" else 0.6)


def test_a_table_of_known_densities(monkeypatch):
    for constant, value in (("ITEMS", 60), ("ASKED", 40), ("STEPS", 2), ("DIMS", (3,)), ("KNOWN", ("mixture",))):
        monkeypatch.setattr(densities, constant, value)
    header, _, row = densities.of_known(quiet=True).splitlines()
    assert header.count("|") == row.count("|") and "r = " in row


def test_a_table_of_known_pairs(monkeypatch):
    for constant, value in (("ITEMS", 60), ("ASKED", 40), ("STEPS", 2), ("DIMS", (3,))):
        monkeypatch.setattr(densities, constant, value)
    header, _, row = densities.of_pairs(quiet=True).splitlines()
    assert header.count("|") == row.count("|") and row.count("r = ") == 4


def test_a_method_learns_without_a_run_on_disk(world, monkeypatch):
    settings = ["train.epochs=1", "model.width=8"]
    monkeypatch.setattr(
        densities, "load_config", lambda *names, **options: load_config(*names, settings=settings, **options)
    )
    monkeypatch.setattr(
        densities, "split", lambda name: densities.Split(Pairs("shapes", "shapes-tiny", name), None, None)
    )
    flow, seconds = densities.fitted("flow", np.arange(100), 0, quiet=True)
    assert seconds > 0 and not flow.training and flow.field.outer.weight.any()
    assert not list(world.glob("checkpoints*"))


def test_the_bandwidth_is_that_of_the_samples():
    """Samples of broad and of narrow densities choose broad and narrow kernels."""
    torch.manual_seed(0)
    broad = unit(500, 16)
    narrow = torch.nn.functional.normalize(unit(1, 16) + 0.01 * broad, dim=-1)
    assert densities.bandwidth(broad) < 20 < 1000 < densities.bandwidth(narrow)
