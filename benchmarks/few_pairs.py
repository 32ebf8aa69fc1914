"""Few pairs, as in a user's own data: every method, as it is and corrected for hubs, against plain CLIP.

    python -m benchmarks.few_pairs ../shared/data/coco500_vitb16.npz --methods clip linear --sizes 100 200

calls the scripts to cache, train and evaluate in the current folder, under few_pairs/<file>, skips results that exist
there, and prints Markdown. The five test parts are disjoint, so that every image is a query once, in a gallery of a
fifth; `--divisions 4` divides the images four times by chance, into twenty parts. Figures are means over the parts, as
each has a gallery and a training of its own; an AUROC leaves out parts without a wrong answer, and an ECE is of all
queries together, as the bins of a part would be nearly empty. Intervals draw images, and differences from plain CLIP
are paired; a second table pairs the query-only uncertainties with the densities'. Where the file has an array
`ambiguity` (M,) of its captions, `order` is Spearman's correlation of the query-only uncertainty with it. `--figure
FILE.png` draws R@1, AURC and the AUROC before the search against the number of training images.
"""

import argparse
import contextlib
import inspect
import io
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

import cache_embeddings
import eval as evaluation
import train
from datasets.embeddings import Pairs
from metrics.calibration import calibration_error, reliability
from metrics.retrieval import ambiguity
from metrics.uncertainty import auroc, selective, spearman
from reporting.words import NONE, RETRIEVAL
from utils.config import known, load_config, make_adaptor, needs_pooled
from utils.errors import UserError, exits_cleanly

SPLITS, DRAWS = 5, 500
BASELINE = "clip"
DENSITIES = ("knn", "kde", "typicality", "density", "vmf-mixture", "flow", "joint-flow")
ONE_SCORE = (BASELINE, *DENSITIES)
COLUMNS = {  # figure: title
    "recall": "R@1", "aurc": "AURC", "probability": "AUROC of the probability", "entropy": "of the entropy",
    "query": "query-only", "words": "words", "ece": "ECE", "order": "order",
}  # fmt: skip


def run(script, *argv):
    """Call a script's main and discard its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        script.main([str(argument) for argument in argv])


def taken(settings, method):
    """The settings KEY=VALUE but those of options that the method's model lacks, as plain CLIP lacks a width."""
    options = inspect.signature(type(make_adaptor(load_config("embeddings", method), dim=8))).parameters
    model = "model."
    return [
        setting
        for setting in settings
        if not setting.startswith(model) or setting.partition("=")[0].removeprefix(model) in options
    ]


def evaluate(row, split, size, settings):
    """Train and evaluate one row of the table on one split, unless its result exists; returns the path of the JSON.

    row: method, mean, --hubs.
    """
    method, mean, hubs = row
    tag = f"split{split}" + (f"-{size}" if size else "")
    kept = Path("rows", tag, "+".join(filter(None, (method, mean, hubs))) + ".json")
    if not kept.is_file():
        flags = ["--dataset", "embeddings", "--method", method, "--tag", tag, "--quiet"]
        if mean:
            flags += ["--mean", mean]
        part = f"train{split}" + (f"-{size}" if size else "")
        run(train, *flags, "--set", f"data.train_split={part}", *taken(settings, method))
        config = load_config("embeddings", method, mean=mean, tag=tag)
        # Where the cosine is the only score, the likelihood is the same with a calibrated posterior.
        calibrated = ["--score", "log_likelihood"] if method in ONE_SCORE else []
        run(evaluation, *flags, "--split", f"test{split}", "--hubs", hubs, *calibrated)
        # test0 is the default split, which a result's name leaves out.
        path = config.result("embeddings" if split == 0 else f"embeddings+test{split}", "retrieval")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path.with_suffix(".npz"), kept.with_suffix(".npz"))
        shutil.copy(path, kept)
    return kept


class Part(NamedTuple):
    """What a test part gives all methods alike."""

    image: np.ndarray  # (N,) ids of its images
    image_of_text: np.ndarray  # (M,)
    ambiguity: np.ndarray | None  # (M,) of its captions


class Queries:
    """What one row of the table gives each query of one direction, of all test parts together.

    paths: of the results, one for each Part.
    """

    def __init__(self, paths, direction, parts):
        side = "text" if direction == "text_to_image" else "image"
        columns, group = {}, []
        # The captions of an image share its probability, of which the arrays hold that of the best caption alone.
        self.share_answers = False
        for path, part in zip(paths, parts, strict=True):
            values, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
            column = {"hit": arrays[f"{direction}_hit"], "entropy": arrays[f"{direction}_entropy"]}
            column["probability"] = arrays[f"{direction}_probability"]
            if f"{side}_uncertainty" in arrays and not values.get("untrained"):
                column["query"] = arrays[f"{side}_uncertainty"]
            if part.ambiguity is not None and side == "text":
                column["ambiguity"] = part.ambiguity
            if f"{side}_words" in arrays and np.ptp(arrays[f"{side}_words"]):
                column["words"] = arrays[f"{side}_words"]
            for name, entries in column.items():
                columns.setdefault(name, []).append(entries)
            self.share_answers |= side == "image" and len(part.image_of_text) > len(part.image)
            group.append(part.image[part.image_of_text] if side == "text" else part.image)
        # An uncertainty that one part lacks is left out.
        self.columns = {name: np.concatenate(of) for name, of in columns.items() if len(of) == len(paths)}
        self.group, self.part = np.concatenate(group), np.repeat(np.arange(len(paths)), [len(rows) for rows in group])

    def figures(self, name, rows=None):
        """A figure of COLUMNS, of all queries or some rows of them: of each part, or of all together, an array.

        NaN where a part, or the row of the table, has none.
        """
        rows = np.arange(len(self.part)) if rows is None else rows
        if name == "ece":
            confidence = self.columns["probability"][rows].clip(0, 1)
            bins = reliability(confidence, self.columns["hit"][rows])
            return np.array([np.nan if self.share_answers else calibration_error(bins)])
        rows = rows[self.part[rows].argsort(kind="stable")]
        starts = np.searchsorted(self.part[rows], np.arange(1, self.part[-1] + 1))
        values = [self._of_part(name, part) if len(part) else None for part in np.split(rows, starts)]
        return np.array(values, dtype=float)  # None becomes NaN

    def _of_part(self, name, rows):
        columns = {key: column[rows] for key, column in self.columns.items()}
        hit = columns["hit"]
        if name == "recall":
            return hit.mean()
        if name == "aurc":
            return selective(-columns["probability"], hit).aurc
        if name == "order":
            if not {"query", "ambiguity"} <= columns.keys():
                return None
            return spearman(columns["query"], columns["ambiguity"])
        values = -columns["probability"] if name == "probability" else columns.get(name)
        return None if values is None else auroc(values, hit)


def draws_of(group):
    """The queries of DRAWS bootstrap draws of groups, as arrays of rows."""
    rng, (_, of_group) = np.random.default_rng(0), np.unique(group, return_inverse=True)
    members = np.split(np.argsort(of_group, kind="stable"), np.cumsum(np.bincount(of_group))[:-1])
    for _ in range(DRAWS):
        yield np.concatenate([members[number] for number in rng.integers(len(members), size=len(members))])


def compare(rows, name, against=BASELINE):
    """A figure of every row, {row: (value, difference from the row `against`, its interval)}; rows: {row: Queries}.

    The AUROC of a probability or before the search is compared with that of plain CLIP's entropy.
    """
    baseline = rows[against]
    theirs = "entropy" if against == BASELINE and name in ("probability", "query") else name
    draws = [None, *draws_of(baseline.group)]
    base = [baseline.figures(theirs, chosen) for chosen in draws]
    result = {}
    for row, queries in rows.items():
        drawn = [queries.figures(name, chosen) for chosen in draws]
        # Paired: over the parts in which both have the figure.
        gap, *gaps = [mean_of(ours - other) for ours, other in zip(drawn, base, strict=True)]
        interval = np.nanquantile(gaps, [0.025, 0.975]) if np.isfinite(gap) else (np.nan, np.nan)
        result[row] = mean_of(drawn[0]), gap, interval
    return result


def mean_of(figures):
    """Mean of the parts that have a figure; NaN if none has."""
    defined = figures[np.isfinite(figures)]
    return defined.mean() if len(defined) else np.nan


def difference(gap, interval):
    low, high = interval
    return f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]"


def table(rows, title):
    """Markdown of one direction; rows: {row: Queries}."""
    figures = {name: compare(rows, name) for name in COLUMNS}
    # A column that no row has is left out.
    shown = [name for name in COLUMNS if any(np.isfinite(value) for value, _, _ in figures[name].values())]
    lines = [f"| {title} | {' | '.join(COLUMNS[name] for name in shown)} |", f"|:--|{'--:|' * len(shown)}"]
    for row in rows:
        cells = []
        for name in shown:
            value, gap, interval = figures[name][row]
            cell = NONE if np.isnan(value) else f"{value:.3f}"
            if row != BASELINE and np.isfinite(gap) and name not in ("entropy", "words"):
                cell += f" ({difference(gap, interval)})"
            cells.append(cell)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def before_the_search(rows, title):
    """Markdown: the AUROC of each density less that of every other query-only uncertainty; None without either."""
    rows = {row: queries for row, queries in rows.items() if "query" in queries.columns and not row.endswith("hubs")}
    densities = [row for row in rows if row in DENSITIES]
    if len(rows) == len(densities) or not densities:
        return None
    lines = [f"| {title}: AUROC before the search, less that of | {' | '.join(densities)} |"]
    lines.append(f"|:--|{'--:|' * len(densities)}")
    for row in rows:
        if row in DENSITIES:
            continue
        gaps = compare({name: rows[name] for name in (row, *densities)}, "query", row)
        lines.append(f"| {row} | {' | '.join(difference(*gaps[name][1:]) for name in densities)} |")
    return "\n".join(lines)


def title_of(row):
    method, mean, hubs = row
    return ", ".join(filter(None, (method, mean, "" if hubs == "none" else "hubs")))


def parts_of(file):
    """The Part of each test part of a file, in the folder of its caches."""
    with np.load(file) as arrays:
        values = arrays.get("ambiguity")
    caches = [Pairs("embeddings", "given", f"test{number}") for number in range(SPLITS)]
    # Ids of captions are their rows in the file, and those of images name them in every division.
    return [
        Part(pairs.image_id, pairs.image_of_text, None if values is None else values[pairs.text_id]) for pairs in caches
    ]


def exported(cache, folder):
    """Write the pairs of a cache, embeddings/<dataset>/<backbone>/<split>, as a file of embeddings; returns its path.

    With `ambiguity` where it is known which captions are true of which images.
    """
    pairs = Pairs(*cache.parts[-3:])
    arrays = {"image": pairs.image, "text": pairs.text, "image_of_text": pairs.image_of_text}
    arrays["caption"] = np.array(pairs.items["text"])
    if pairs.matches is not None:
        arrays["ambiguity"] = ambiguity(pairs.matches)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{'-'.join(cache.parts[-3::2])}.npz"
    np.savez(path, logit_scale=pairs.meta["logit_scale"], **arrays)
    return path


def measure(file, methods, means, sizes, settings, divisions):
    """Every row of the table of a file at every size: {size: {direction: {title: Queries}}}; 0 is all pairs."""
    splits = [f"{part}{number}" for number in range(SPLITS) for part in ("train", "test")]
    splits += [f"train{number}-{size}" for size in sizes if size for number in range(SPLITS)]
    with np.load(file) as arrays:
        scale = [f"data.options.logit_scale={float(arrays['logit_scale'])}"] if "logit_scale" in arrays else []
    rows = []
    for method in dict.fromkeys([BASELINE, *methods]):
        of_method = [mean for mean in means if "mean" in load_config("embeddings", method).model] or [""]
        rows += [(method, mean, hubs) for mean in of_method for hubs in ("none", "auto")]
    parts, paths, home = [], {size: {title_of(row): [] for row in rows} for size in sizes}, Path.cwd()
    for division in range(divisions):
        folder = home / f"division{division}" if division else home
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        options = ["--set", f"data.options.seed={division}", *scale]
        run(cache_embeddings, "--dataset", "embeddings", "--root", file, "--quiet", "--splits", *splits, *options)
        parts += parts_of(file)
        for size, of_rows in paths.items():
            for row in rows:
                of_rows[title_of(row)] += [evaluate(row, split, size, settings).absolute() for split in range(SPLITS)]
    os.chdir(home)
    return {
        size: {
            direction: {title: Queries(of_row, direction, parts) for title, of_row in of_rows.items()}
            for direction in RETRIEVAL
        }
        for size, of_rows in paths.items()
    }


def draw(results, path):
    """Draw figures against the number of training images: three rows of panels for each file, a line for each row.

    A color is a method's, and dashes are hub correction.
    """
    from matplotlib.figure import Figure

    labels = {"recall": "R@1 (%)", "aurc": "100 AURC", "query": "100 AUROC before the search"}
    figure = Figure(figsize=(8, 7 * len(results)), layout="constrained")
    axes = figure.subplots(len(labels) * len(results), len(RETRIEVAL), squeeze=False)
    lines = [(stem, sizes, name) for stem, sizes in results.items() for name in labels]
    for panels, (stem, sizes, name) in zip(axes, lines, strict=True):
        for panel, direction in zip(panels, RETRIEVAL, strict=True):
            rows = list(next(iter(sizes.values()))[direction])
            methods = list(dict.fromkeys(title.removesuffix(", hubs") for title in rows))
            for title in rows:
                number = methods.index(title.removesuffix(", hubs"))
                values = [100 * mean_of(sizes[size][direction][title].figures(name)) for size in sizes]
                look = {"color": f"C{number - 1}" if number else "black", "marker": "osv^D*P"[number % 7], "ms": 4}
                look["linestyle"] = "--" if title.endswith("hubs") else "-"
                panel.plot([str(size or "all") for size in sizes], values, label=title, lw=1, **look)
            panel.set_title(f"{stem}: {RETRIEVAL[direction]}", fontsize=8)
            panel.set(xlabel="training images", ylabel=labels[name])
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


@exits_cleanly()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = ".npz files of embeddings, see datasets/arrays.py, or caches: embeddings/<dataset>/<backbone>/<split>"
    parser.add_argument("files", nargs="+", type=Path, help=what)
    parser.add_argument("--methods", nargs="+", help="by default all that need no pooled features")
    parser.add_argument("--means", nargs="+", default=["frozen"], help="any of frozen, residual, learned")
    parser.add_argument("--sizes", nargs="+", type=int, default=[0], help="training images; 0: all but the test part")
    parser.add_argument("--divisions", type=int, default=1, help="how often the images are divided into five parts")
    parser.add_argument("--figure", type=Path, help="where to draw the figures against the sizes")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for train.py")
    args = parser.parse_args(argv)
    made = Path("few_pairs", "exported")
    files = [(exported(file, made) if file.is_dir() else file).absolute() for file in args.files]
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no file {file}: give an .npz of embeddings.")
    pooled = [name for name in known("methods") if needs_pooled(load_config("embeddings", name))]
    methods = args.methods or [name for name in known("methods") if name not in pooled]
    figure, home, results = args.figure and args.figure.absolute(), Path.cwd(), {}
    for file in files:
        folder = home / "few_pairs" / file.stem
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        results[file.stem] = measure(file, methods, args.means, args.sizes, args.set, args.divisions)
        os.chdir(home)
        for size, directions in results[file.stem].items():
            for direction, rows in directions.items():
                images = f"{size or 'all'} training images"
                title = f"{file.stem}, {images}, {RETRIEVAL[direction]}"
                print("", table(rows, title), before_the_search(rows, title) or "", sep="\n\n", flush=True)
    if figure:
        draw(results, figure)


if __name__ == "__main__":
    main()
