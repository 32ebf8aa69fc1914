"""Few pairs, as in a user's own data: every method on five random splits of one .npz of embeddings.

    python -m benchmarks.few_pairs ../shared/data/coco500_vitb16.npz

calls the scripts to cache, train and evaluate in the current folder, skips results that exist there, and prints
Markdown: means and standard deviations over the splits, which are by images, of R@1 and of the AUROC with which an
uncertainty detects wrong answers.
"""

import argparse
import contextlib
import io
import json
from pathlib import Path

import numpy as np

import cache_embeddings
import eval as evaluation
import train
from reporting.words import NONE, RETRIEVAL
from utils.config import known, load_config, needs_pooled
from utils.errors import UserError, exits_cleanly

SPLITS = 5
COLUMNS = {  # title: the score, and the path of keys in that score's part of a result
    "R@1 by cosine": ("similarity", "recall", "1"),
    "by likelihood": ("log_likelihood", "recall", "1"),
    "query-only": (None, "uncertainty", "query", "auroc"),
    "cosine: top": ("similarity", "uncertainty", "top", "auroc"),
    "margin": ("similarity", "uncertainty", "margin", "auroc"),
    "entropy": ("similarity", "uncertainty", "entropy", "auroc"),
    "posterior: entropy": ("log_likelihood", "uncertainty", "entropy", "auroc"),
    "top probability": ("log_likelihood", "uncertainty", "probability", "auroc"),
}


def run(script, *argv):
    """Call a script's main and discard its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        script.main([str(argument) for argument in argv])


def result(method, mean, split, settings):
    """Train and evaluate one method on one split, unless the result exists; returns the result file's values."""
    flags = ["--dataset", "embeddings", "--method", method, "--tag", f"split{split}", "--quiet"]
    if mean:
        flags += ["--mean", mean]
    config = load_config("embeddings", method, mean=mean, tag=f"split{split}")
    # test0 is the default split, which a result's name leaves out.
    path = config.result("embeddings" if split == 0 else f"embeddings+test{split}", "retrieval")
    if not path.is_file():
        run(train, *flags, "--set", f"data.train_split=train{split}", *settings)
        run(evaluation, *flags, "--split", f"test{split}", "--score", "both")
    return json.loads(path.read_text())


def figures(values, side):
    """The figures of one result, one for each of COLUMNS; NaN where the result has none."""
    other = values["other_score"]
    parts = {values["score"]: values[side], other["score"]: other[side], None: values[side]}
    row = []
    for score, *path in COLUMNS.values():
        value = parts[score]
        if values.get("untrained") and path[1:2] == ["query"]:
            value = {}  # of random weights
        for key in path:
            value = (value or {}).get(key)
        row.append(np.nan if value is None else value)
    return row


@exits_cleanly()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="an .npz of embeddings: see datasets/arrays.py")
    parser.add_argument("--methods", nargs="+", help="by default all that need no pooled features")
    parser.add_argument("--means", nargs="+", default=["frozen", "residual"], help="any of frozen, residual, learned")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for train.py")
    args = parser.parse_args(argv)
    if not args.file.is_file():
        raise UserError(f"there is no file {args.file}: give an .npz of embeddings.")
    splits = [f"{part}{number}" for number in range(SPLITS) for part in ("train", "test")]
    run(cache_embeddings, "--dataset", "embeddings", "--root", args.file, "--quiet", "--splits", *splits)
    all_methods = (name for name in known("methods") if not needs_pooled(load_config("embeddings", name)))
    rows = {}
    for method in args.methods or all_methods:
        for mean in args.means if "mean" in load_config("embeddings", method).model else [""]:  # plain CLIP has none
            results = [result(method, mean, split, args.set) for split in range(SPLITS)]
            rows[f"{method}, {mean}" if mean else method] = results
    for side, title in RETRIEVAL.items():
        print(f"\n| {title} | {' | '.join(COLUMNS)} |\n|:--|{'--:|' * len(COLUMNS)}")
        for name, results in rows.items():
            columns = np.array([figures(values, side) for values in results]).T
            cells = [NONE if np.isnan(x).any() else f"{x.mean():.3f} ± {x.std(ddof=1):.3f}" for x in columns]
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
