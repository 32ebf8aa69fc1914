"""What training makes of uncertainty: methods whose YAML says `ordered: true` order captions by their ambiguity."""

import json

import pytest

import eval as evaluation
import train
from utils.config import known, load_config

ORDERED = [method for method in known("methods") if load_config("shapes", method).ordered]
SHORT = ["train.epochs=20", "train.batch_size=256", "optim.lr=2e-3", "train.val_fraction=0"]


def test_some_methods_are_ordered():
    assert "asymvlm-psd" in ORDERED


@pytest.mark.parametrize("method", ORDERED)
def test_uncertainty_follows_true_ambiguity(world, method):
    run = ["--dataset", "shapes", "--method", method, "--device", "cpu", "--quiet"]
    train.main([*run, "--set", *SHORT])
    evaluation.main(run)
    [path] = world.glob("results/**/*.json")
    assert json.loads(path.read_text())["text_to_image"]["spearman_ambiguity"] >= 0.8
