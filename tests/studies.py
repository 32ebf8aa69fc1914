"""Result files in the format of active_learning.py and benchmarks/factor_trace.py, with random numbers."""

import copy
import json

import numpy as np

FIGURES = ("accuracy", "nll", "ece")
BUDGETS = [10, 25, 100]
SETTINGS = {
    "pool": ["train", "shifted-train"], "target": "shifted-test", "val": "shifted-val", "val_counts": None,
    "budgets": BUDGETS, "preset": "default", "factors": "pool", "lr": 0.0003,
}  # fmt: skip


def judged(rng, auroc=0.75):
    """Random figures of one model on the target."""
    levels = {"count": [100] * 10, "entropy": sorted(rng.random(10)), "error": sorted(rng.random(10))}
    return dict(zip(FIGURES, rng.random(3), strict=True)) | {
        "by_entropy": levels, "entropy_auroc": auroc, "probability_auroc": auroc and auroc + 0.1
    }  # fmt: skip


def make_result(strategy, seed, dataset="shapes", backbone="tiny", settings=SETTINGS, **changes):
    """The values of one result: the same before any label, then random by strategy and seed."""
    rng = np.random.default_rng([*strategy.encode(), seed])
    curve = [
        {"budget": budget, "labels": budget, "val_labels": 500, "epoch": 3} | judged(rng)
        for budget in settings["budgets"]
    ]
    result = {
        "dataset": dataset, "backbone": backbone, "settings": copy.deepcopy(settings), "seed": seed,
        "fingerprint": {"train": "f"}, "strategy": strategy, "classes": 8, "images": 1000, "offered": 2000,
        "prior_precision": 1.5,
        "chosen_split": ["train"], "chosen_id": [3], "before": judged(np.random.default_rng(0), 0.5), "curve": curve,
    }  # fmt: skip
    return result | changes


def write_result(folder, strategy, seed, name="shifted-test", **options):
    """Write one result where active_learning.py does, under a folder of all results; returns its path."""
    result = make_result(strategy, seed, **options)
    path = folder / result["dataset"] / result["backbone"] / "active" / name / f"{strategy}-seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path


def write_study(folder, strategies=("random", "entropy", "bald"), seeds=(0, 1, 2), **options):
    """Write results of every strategy and seed; returns their folder."""
    paths = [write_result(folder, strategy, seed, **options) for strategy in strategies for seed in seeds]
    return paths[0].parent


def write_trace(folder, dataset="shapes", backbone="tiny", **changes):
    """Write a trace where benchmarks/factor_trace.py does; returns its path."""
    rng = np.random.default_rng(0)
    sides = {
        side: [
            {"candidates": candidates, "batches": batches, "relative_trace": list(rng.random(5))}
            for candidates in (128, 512, 2048)
            for batches in (1, 2, 3)
        ]
        for side in ("image", "text")
    }
    metadata = {"dataset": dataset, "backbone": backbone, "fingerprint": "f", "trials": 5, "items": 8000}
    path = folder / dataset / backbone / "factor-trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metadata | {"sides": sides} | changes))
    return path
