"""Decisions on figures: match probability, conformal sets and rejection of plain CLIP, on `shapes` and few real pairs.

    python -m benchmarks.decisions [../shared/data/coco500_vitb16.npz ...] [--shapes] [--speed]

prints Markdown. Of each file of embeddings five disjoint test parts are judged: 200 images of the others calibrate the
posterior, the rest teach, in galleries as large as the judged one. `--shapes` judges the split `test`, each half of its
scenes by what the other teaches, and redraws the halves 200 times; both splits and `train` have to be cached. `--speed`
times uncertainty.py's search in 100,000 memory-mapped items. Results that exist are not made again.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import cache_embeddings
import eval as evaluation
import train
import uncertainty
from benchmarks.few_pairs import run
from metrics.calibration import calibration_error, expected_error, halves, reliability
from metrics.conformal import KINDS, expected_coverage, threshold
from reporting.words import NONE, RETRIEVAL
from utils.checkpoint import Run
from utils.config import HOME, load_config
from utils.errors import UserError, exits_cleanly

PARTS, POSTERIOR, REDRAWN = 5, 200, 200
TASKS = ("matching", "conformal", "unanswerable")
ALPHAS = ("0.05", "0.1", "0.2")
KIND = "lac"
GALLERY, DIM = 100_000, 512
SEARCHED = ("clip", "asymvlm-psd", "pcmepp", "probvlm", "linear")
ABSENT = HOME / "benchmarks/absent.txt"


def evaluated(dataset, split, usual, tag="", extra=()):
    """Results of all tasks of plain CLIP on a split: {task: (values, arrays)}, made where they are missing."""
    config, results = load_config(dataset, "clip", tag=tag), {}
    for task in TASKS:
        path = config.result(dataset if split == usual else f"{dataset}+{split}", task)
        if not path.is_file():
            flags = ["--dataset", dataset, "--method", "clip", *(("--tag", tag) if tag else ()), "--split", split]
            absent = (
                ["--absent", HOME / "benchmarks/absent.txt"] if (dataset, task) == ("shapes", "unanswerable") else []
            )
            run(evaluation, *flags, "--task", task, "--score", "log_likelihood", "--quiet", *extra, *absent)
        results[task] = json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz")))
    return results


def parts_of(file):
    """Results of each test part of a file of embeddings: list of `evaluated`."""
    splits = [f"{kind}{part}{count}" for part in range(PARTS) for kind, count in
              (("train", f"-{POSTERIOR}"), ("rest", f"-{POSTERIOR}"), ("test", ""))]  # fmt: skip
    with np.load(file) as arrays:
        scale = ["--set", f"data.options.logit_scale={float(arrays['logit_scale'])}"] if "logit_scale" in arrays else []
    run(cache_embeddings, "--dataset", "embeddings", "--root", file, "--quiet", "--splits", *splits, *scale)
    results = []
    for part in range(PARTS):
        tag, pool = f"part{part}", f"train{part}-{POSTERIOR}"
        flags = ["--dataset", "embeddings", "--method", "clip", "--tag", tag, "--quiet"]
        run(train, *flags, "--set", f"data.train_split={pool}", "train.val_fraction=0.1")
        results.append(evaluated("embeddings", f"test{part}", "test0", tag, ["--val", f"rest{part}-{POSTERIOR}"]))
    return results


def mean(values, digits=3):
    """A mean over parts, with their range."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def matching_table(results, direction):
    lines = [
        "| by | ECE, all pairs | ECE, best answers (by chance, its mean to its 95 % quantile) | AUROC | AUPR |",
        "|:--|--:|--:|--:|--:|",
    ]
    sides = [result["matching"][0][direction]["matching"] for result in results]
    for basis in ("score", "posterior"):
        for kind in ("platt", "isotonic", "answer"):
            records = [side[basis][kind] for side in sides]
            columns = [f"{direction}_{basis}_{kind}_confidence", f"{direction}_{basis}_hit"]
            # Of all parts together: 100 queries have an ECE of .1 by chance.
            confidence, hit = (np.concatenate([r["matching"][1][column] for r in results]) for column in columns)
            best = calibration_error(reliability(confidence, hit))
            chance = "{:.3f} to {:.3f}".format(*expected_error(confidence))
            of_pairs = {key: mean([r[key] for r in records], digits) if kind != "answer" else NONE
                        for key, digits in (("ece", 5), ("auroc", 3), ("aupr", 3))}  # fmt: skip
            cells = [of_pairs["ece"], f"{best:.3f} ({chance})", of_pairs["auroc"], of_pairs["aupr"]]
            lines.append(f"| {basis}, {kind} | {' | '.join(cells)} |")
    lines += ["", "| precision asked for | basis | precision | recall | queries answered |", "|--:|:--|--:|--:|--:|"]
    for number in range(5):
        for basis in ("score", "posterior"):
            rows = [side[basis]["thresholds"][number] for side in sides]
            cells = []
            for key in ("precision", "recall", "answered"):
                known = [row["measured"][key] for row in rows if row["measured"][key] is not None]
                cells.append(mean(known, 2) if known else NONE)
            lines.append(f"| {rows[0]['precision']:.2f} | {basis} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conformal_table(results, direction):
    """Coverage of all parts together, beside the interval that chance leaves it, over all and by level."""
    lines = [f"| sets, {RETRIEVAL[direction]} | asked | coverage [interval] | chance leaves | median size |"
             " coverage by level, a threshold each (chance leaves) | median sizes by level | by level, one threshold |",
             "|:--|--:|--:|--:|--:|:--|:--|:--|"]  # fmt: skip
    outside = 0
    for kind in KINDS:
        for alpha in ALPHAS:
            records = [result["conformal"][0][direction]["conformal"][kind][alpha] for result in results]
            coverage, chance = pooled(records, alpha)
            size = np.concatenate([result["conformal"][1][f"{direction}_{kind}_{alpha}_size"] for result in results])
            outside += not chance[0] <= coverage <= chance[1]
            levels, sizes, within = [], [], []
            for number in range(5):
                each = [record["levels"][number] for record in records]
                value, limits = pooled(each, alpha)
                outside += not limits[0] <= value <= limits[1]
                levels.append(f"{value:.2f} ({limits[0]:.2f} to {limits[1]:.2f})")
                place = [result["conformal"][1][f"{direction}_level"] == number for result in results]
                of_level = [
                    r["conformal"][1][f"{direction}_{kind}_{alpha}_levels_size"][p] for r, p in zip(results, place)
                ]
                sizes.append(f"{np.quantile(np.concatenate(of_level), 0.5, method='inverted_cdf'):,}")
                within.append(f"{pooled([record['within'][number] for record in records], alpha)[0]:.2f}")
            interval = (
                f" [{records[0]['interval'][0]:.3f}, {records[0]['interval'][1]:.3f}]" if len(records) == 1 else ""
            )
            lines.append(
                f"| {kind} | {1 - float(alpha):.2f} | {coverage:.3f}{interval} | {chance[0]:.3f} to {chance[1]:.3f} |"
                f" {np.quantile(size, 0.5, method='inverted_cdf'):,} | {', '.join(levels)} | {', '.join(sizes)} |"
                f" {', '.join(within)} |"
            )
    total = len(KINDS) * len(ALPHAS) * 6
    return "\n".join(lines) + f"\n\nOutside of what chance leaves: {outside} of {total}."


def pooled(records, alpha):
    """Coverage of the queries of all records, and the interval that chance leaves it."""
    records = [record for record in records if record["coverage"] is not None]
    queries = np.array([record["queries"] for record in records])
    coverage = queries @ [record["coverage"] for record in records] / queries.sum()
    if len(records) == 1:
        return coverage, records[0]["expected"]
    # Of one query an image, as the parts of few pairs are.
    return coverage, expected_coverage(min(record["taught_by"] for record in records), int(queries.sum()), float(alpha))


def rejection_table(results, direction):
    names = results[0]["unanswerable"][0][direction]["rejection"]
    lines = [
        "| uncertainty | AUROC of no answer | FPR95 | AURC of both | AUROC, absent captions |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name in names:
        records = [result["unanswerable"][0][direction]["rejection"][name] for result in results]
        cells = [mean([record[key] for record in records]) for key in ("auroc", "fpr95", "aurc")]
        if len(records) == 1:
            cells[0] += " [{:.3f}, {:.3f}]".format(*records[0]["interval"])
        absent = results[0]["unanswerable"][0][direction].get("absent", {}).get("rejection", {}).get(name)
        cells.append("{:.3f} [{:.3f}, {:.3f}]".format(absent["auroc"], *absent["interval"]) if absent else NONE)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    answer = [result["unanswerable"][0][direction]["answer"]["ece"] for result in results]
    return "\n".join(lines) + f"\n\nECE of the learned probability of an answer: {mean(answer)}."


def redrawn(arrays, direction, kind=KIND):
    """Coverage over redrawn halves of the groups: {alpha: (mean, share of draws within what chance leaves)}."""
    values, group = arrays[f"{direction}_{kind}_nonconformity"], arrays[f"{direction}_group"]
    images, result = len(np.unique(group)), {}
    size = 1 / np.bincount(group)[group]
    for alpha in ALPHAS:
        covered = []
        for seed in range(REDRAWN):
            first = halves(group, seed)
            inside = values[~first] <= threshold(values[first], group[first], float(alpha))
            covered.append(inside @ size[~first] / size[~first].sum())
        low, high = expected_coverage(images // 2, images - images // 2, float(alpha))
        result[alpha] = np.mean(covered), np.mean([low <= value <= high for value in covered])
    return result


def speed():
    """Seconds of two searches of one query in GALLERY memory-mapped images: {(method, which): (wall, processor)}.

    From the opened run to the answer. The first search finds nothing kept of the gallery. The second finds what the
    method knows of each item, as every search does in a gallery that `eval.py --task conformal` has judged.
    """
    seconds, data, few, gallery = {}, ["--dataset", "embeddings", "--device", "cpu"], "train0-1000", "rest0-1000"
    rng, count = np.random.default_rng(0), (GALLERY + 1000) * 5 // 4  # rest0: four fifths
    image = rng.normal(size=(count, DIM)).astype(np.float32)
    text = image + rng.normal(scale=1.5, size=image.shape).astype(np.float32)
    np.savez("pairs.npz", image=image.astype(np.float16), text=text.astype(np.float16))
    run(cache_embeddings, "--dataset", "embeddings", "--root", "pairs.npz", "--quiet", "--splits", few, gallery)
    for method in SEARCHED:
        chosen = [*data, "--method", method]
        run(train, *chosen, "--quiet", "--set", "train.epochs=1", f"data.train_split={few}")
        for task in ("conformal", "unanswerable"):
            run(evaluation, *chosen, "--split", few, "--task", task, "--allow-leakage", "--hubs", "none", "--quiet")
        args, config = uncertainty.parse([*chosen, "--gallery", gallery, "--learned-on", few, "a prompt"])
        adaptor, config, identity = Run(config).load(torch.device("cpu"))
        with torch.inference_mode():
            query = adaptor.adapt_text(torch.randn(1, DIM))
        opened = args, Run(config), Run(config).weights_hash(), config, identity
        for which in ("first", "second"):
            start = time.perf_counter(), time.process_time()
            uncertainty.search(*opened, {"text": ([0], query)}, adaptor, torch.device("cpu"))
            seconds[method, which] = time.perf_counter() - start[0], time.process_time() - start[1]
    return seconds


@exits_cleanly()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help=".npz files of embeddings, see datasets/arrays.py")
    parser.add_argument("--shapes", action="store_true", help="judge shapes' test split")
    parser.add_argument("--speed", action="store_true", help="time the search in a large gallery")
    args = parser.parse_args(argv)
    home, every = Path.cwd(), {}
    for file in [file.absolute() for file in args.files]:
        if not file.is_file():
            raise UserError(f"there is no file {file}: give an .npz of embeddings.")
        folder = home / "decisions" / file.stem
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        every[file.stem] = parts_of(file)
        os.chdir(home)
    if args.shapes:
        run(train, "--dataset", "shapes", "--method", "clip", "--quiet")
        every["shapes, test"] = [evaluated("shapes", "test", "val")]
    for name, results in every.items():
        for direction, title in RETRIEVAL.items():
            print(f"### {name}, {title}\n")
            for table in (matching_table, conformal_table, rejection_table):
                print(table(results, direction), end="\n\n", flush=True)
            if len(results) == 1:
                for kind in KINDS:
                    found_in = redrawn(results[0]["conformal"][1], direction, kind)
                    text = "; ".join(f"{1 - float(a):.2f}: {m:.4f}, {share:.2f}" for a, (m, share) in found_in.items())
                    print(
                        f"{kind}, {REDRAWN} redrawn halves, mean coverage and share within chance: {text}", end="\n\n"
                    )
    if args.speed:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                every_search = speed()
            finally:
                os.chdir(home)
        for (method, which), (wall, used) in every_search.items():
            print(f"{which} search in {GALLERY:,} x {DIM}, {method}: {wall:.2f} s, {used:.2f} s of processor time")


if __name__ == "__main__":
    main()
