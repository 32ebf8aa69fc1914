"""Turn result files into tables, figures and one page.

    python report.py --dataset shapes

reads results/<trained on>/**/*-retrieval.json and writes into results/<trained on>: report.html (one self-contained
page), table.md, table.tex, table.csv, and the figures recall_by_level and uncertainty_against_ambiguity (.png, .pdf).
"""

import zipfile
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np

from utils import html, plots, tables
from utils.arguments import make_parser
from utils.errors import UserError, exits_cleanly
from utils.files import read_json, write_text

IN_TABLE = {"uncer_levels": "numbers of uncertainty levels", "fingerprint": "embeddings"}  # what all results share


def parse(argv):
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="trained on: the folder of results to report")
    parser.add_argument("--backbone", help="report this one alone")
    parser.add_argument("--results", default="results", type=Path, help="folder of all results")
    parser.add_argument("--quiet", action="store_true", help="print nothing but where the page lies")
    return parser.parse_args(argv)


def read(folder, backbone=None):
    """Read the results in `folder` into tables.Blocks; raises UserError where one is damaged or they do not fit."""
    found = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("**/*-retrieval.json")):
        result = tables.Result(path.relative_to(folder), _read_one(path))
        key = result.values["evaluated_on"], result.values["config"]["backbone"]
        if backbone in (None, key[1]):
            found[key][result.values["variant"]].append(result)
    if not found:
        of = f" of backbone '{backbone}'" if backbone else ""
        command = f"python eval.py --dataset {folder.name} --method METHOD"
        others = ", ".join(sorted(path.name for path in folder.parent.glob("*/"))) or "nothing"
        where = f"{folder.absolute()} ({folder.parent} holds {others})"
        raise UserError(f"there are no retrieval results{of} in {where}: run `{command}` first.")
    for variants in found.values():
        _must_fit(folder, variants)
    return [tables.Block(*key, _in_order(found[key])) for key in sorted(found)]


def _read_one(path):
    try:
        values = read_json(path)
        _ = [values[name] for name in ("images", "captions", "evaluated_on", *IN_TABLE)]
        _ = [values["config"][name] for name in ("backbone", "seed")]
        tables.Block("", "", {values["variant"]: [tables.Result(path, values)]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged or not a result of eval.py: delete it and evaluate again.") from None
    return values


def _must_fit(folder, variants):
    """Raise a UserError naming two files that must not stand in one table, or whose mean would mean nothing."""
    first = next(iter(variants.values()))[0]
    for runs in variants.values():
        for i, run in enumerate(runs):
            for name, what in IN_TABLE.items():
                if run.values[name] != first.values[name]:
                    both = f"{folder / first.path} and {folder / run.path}"
                    raise UserError(f"{both} have different {what}: evaluate both again, or delete one.")
            for other in runs[:i]:
                what = _clash(other.values["config"], run.values["config"])
                if what:
                    raise UserError(
                        f"{folder / other.path} and {folder / run.path} are not two seeds of one variant, for they have"
                        f" {what}: name one with --tag in train.py and eval.py, or delete it."
                    )


def _clash(one, other):
    """Say what keeps the runs of two configurations from being seeds of one variant; None where nothing does."""
    if one["seed"] == other["seed"]:
        return "the same seed"
    flat = [config | {f"train.{name}": value for name, value in config["train"].items()} for config in (one, other)]
    decisive = ("score", "model", "optim", "train.batch_size", "train.epochs")
    return next((f"different {name}" for name in decisive if flat[0].get(name) != flat[1].get(name)), None)


def _in_order(variants):
    """Put methods without an uncertainty first, as the baseline they are, then names; and seeds by number."""
    names = sorted(variants, key=lambda name: ("levels" in variants[name][0].values["text_to_image"], name))
    return {name: sorted(variants[name], key=lambda run: run.values["config"]["seed"]) for name in names}


def samples_of(folder, block):
    """Per variant that has both, of its first seed: each caption's ambiguity (M,), uncertainty (M,), and Spearman."""
    samples = {}
    for variant, runs in block.results.items():
        path, spearman = folder / runs[0].path, runs[0].values["text_to_image"].get("spearman_ambiguity")
        arrays_path = path.with_suffix(".npz")
        if spearman is None:
            continue
        try:
            with np.load(arrays_path) as arrays:
                samples[variant] = arrays["ambiguity"], arrays["text_uncertainty"], spearman
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{arrays_path} is missing or damaged: delete {path} and evaluate again.") from None
    return samples


@exits_cleanly()
def main(argv=None):
    args = parse(argv)
    folder = args.results / args.dataset
    blocks = read(folder, args.backbone)
    samples = [samples_of(folder, block) for block in blocks]
    looks = plots.looks(blocks)
    for suffix, write in (("md", tables.to_markdown), ("tex", tables.to_latex), ("csv", tables.to_csv)):
        write_text(folder / f"table.{suffix}", write(blocks))
    for block, sample in zip(blocks, samples, strict=True):
        suffix = "" if len(blocks) == 1 else f"-{block.evaluated_on}-{block.backbone}"
        for draw, data in ((plots.recall_by_level, block), (plots.uncertainty_against_ambiguity, sample)):
            figure = draw(data, looks)
            if figure:
                plots.save(figure, folder / f"{draw.__name__}{suffix}")
    page = folder / "report.html"
    write_text(page, html.page(args.dataset, blocks, samples, looks))
    if not args.quiet:
        print(tables.to_text(blocks), end="\n\n")
    print(page)


if __name__ == "__main__":
    main()
