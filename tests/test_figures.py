"""Figures promised for the built-in data set and backbone, on the whole val split, after a short training."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import made_once

import cache_embeddings
import eval as evaluation
import train
from datasets.embeddings import Pairs
from datasets.shapes import UNNAMED, Shapes

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a quarter of the training images of `shapes`, and all val images, cached."""
    cache = ["--dataset", "shapes", "--quiet", "--set", "data.options.train_images=2000"]
    return made_once(tmp_path_factory, "figures", lambda: cache_embeddings.main(cache))


def test_built_in_backbone_answers_full_descriptions(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pairs = Pairs("shapes", "shapes-tiny", "val")
    image, text = (F.normalize(torch.tensor(np.array(x)).float(), dim=-1) for x in (pairs.image, pairs.text))
    full = (Shapes("unused").mentions("val") != UNNAMED).all(axis=1)
    hits = (text[full] @ image.T).argmax(dim=1).numpy() == pairs.image_of_text[full]
    limit = 1 / np.asarray(pairs.matches.sum(axis=0)).ravel()[full]
    assert len(pairs.image) == 1000 and hits.mean() >= 0.75 * limit.mean()
    assert hits.mean() > 0.95  # of configs/backbones/shapes-tiny.yaml, minus the spread over wordings


@pytest.mark.parametrize("method", ["asymvlm-psd", "asymvlm-vmf"])
def test_uncertainty_follows_true_ambiguity(folder, monkeypatch, method):
    monkeypatch.chdir(folder)
    run = ["--dataset", "shapes", "--method", method, "--quiet"]
    train.main([*run, "--set", "train.epochs=20", "train.batch_size=256", "model.width=128"])
    evaluation.main(run)
    result = json.loads((folder / f"results/shapes/shapes-tiny/{method}/seed0/shapes-retrieval.json").read_text())
    side = result["text_to_image"]
    query = side["uncertainty"]["query"]
    assert query["spearman"] >= 0.93
    assert side["recall"]["1"] >= 0.65 * side["bayes_recall"]
    assert abs(query["s"]) >= 0.97
    # Half the images and half the steps; after the full training, the shares of falling steps and chains are 1.
    assert result["hierarchy"]["uncertainty"]["query"]["falling_steps"] >= 0.85
