"""What tests of decisions share: small problems, cached data, flags and the results that they name."""

import json
from pathlib import Path

import numpy as np
import torch

import cache_embeddings
import eval as evaluation
import train

CLIP = ["--dataset", "embeddings", "--method", "clip", "--quiet", "--device", "cpu"]
RESULT = "results/embeddings/given/clip/seed0/embeddings-{}.json"
SEARCH = ["--dataset", "shapes", "--method", "clip", "--device", "cpu", "--gallery", "val"]
LEARNED = "results/shapes/shapes-tiny/clip/seed0/shapes-{}.json"


def pairs_of(positives):
    return np.repeat(np.arange(len(positives)), [len(items) for items in positives]), np.concatenate(positives)


def score_of(scores):
    tensor = torch.tensor(scores)
    return lambda rows: tensor[rows]


def result(task, *flags):
    evaluation.main([*CLIP, "--task", task, *flags])
    path = Path(RESULT.format(task))
    return json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz")))


def cosines():
    from datasets.embeddings import Pairs

    split = Pairs("embeddings", "given", "test0")
    image, text = (np.array(x, dtype=np.float64) for x in (split.image, split.text))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    return unit[1] @ unit[0].T, split.image_of_text


def problem():
    """Scores (Q, G) of queries with several answers each, some of them tied; rows of the answers, and groups."""
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(60, 40)), 1)
    positives = [np.sort(rng.choice(40, size=rng.integers(1, 4), replace=False)) for _ in range(60)]
    for row, items in enumerate(positives):
        scores[row, items] += 1
    return scores, positives, np.arange(60) // 2


def cache_pairs():
    """Cache 300 pairs of random embeddings, of which some captions fit several images, and train `clip` on them."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(300, 16)).astype(np.float32)
    text = np.repeat(image, 2, axis=0) + rng.normal(size=(600, 16), scale=1.5).astype(np.float32)
    np.savez("pairs.npz", image=image, text=text, image_of_text=np.repeat(np.arange(300), 2))
    splits = ["train0-150", "rest0-150", "rest0-237", "rest0-238", "train0", "test0", "all"]
    cache = ["--dataset", "embeddings", "--root", "pairs.npz", "--quiet", "--splits", *splits]
    cache_embeddings.main([*cache, "--set", "data.options.logit_scale=5.0"])
    train.main([*CLIP[:-2], "--val-fraction", "0", "--set", "data.train_split=train0-150"])


def cache_classes():
    """Cache 300 embeddings of images in six classes, and prepare `clip`."""
    rng = np.random.default_rng(0)
    center, label = rng.normal(size=(6, 16)), np.arange(300) % 6
    image = center[label] + rng.normal(size=(300, 16), scale=1.5)
    names = {"label": label, "class_of_text": np.arange(6), "class_name": np.array(list("abcdef"))}
    np.savez("classes.npz", image=image.astype(np.float32), text=center.astype(np.float32), **names)
    cache = ["--dataset", "embeddings", "--root", "classes.npz", "--quiet", "--splits", "test0", "train0", "train0-90"]
    cache_embeddings.main([*cache, "rest0-90", "--set", "data.options.logit_scale=8.0"])
    train.main([*CLIP[:-2], "--set", "data.train_split=train0-90"])


def learn_from(world):
    """Let the captions of a cached `shapes` teach about decisions, by `clip`."""
    for name in ("embeddings", "data"):
        Path(name).symlink_to(world / name)
    train.main(["--dataset", "shapes", "--method", "clip", "--quiet", "--device", "cpu"])
    run = ["--dataset", "shapes", "--method", "clip", "--quiet", "--device", "cpu", "--score", "log_likelihood"]
    Path("absent.txt").write_text("a dog on a sofa\n\na city at night\na red hexagon\n")
    for task in ("matching", "conformal", "unanswerable"):
        evaluation.main([*run, "--task", task, *(["--absent", "absent.txt"] * (task == "unanswerable"))])
