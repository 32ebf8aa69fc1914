"""Turn result files into tables, figures and one page.

    python report.py --dataset shapes

reads results/<trained on>/**/*-retrieval.json, *-classification.json and *-hierarchy.json of eval.py, active/** of
active_learning.py and factor-trace.json of benchmarks/factor_trace.py, whichever there are, and writes into
results/<trained on>: report.html (one self-contained page), table.md, table.tex, table.csv (in long form: a line per
figure), and every figure as .png and .pdf.
"""

import itertools
from pathlib import Path

from tqdm import tqdm

from utils import active_results, factor_traces, html, plots, results, tables
from utils.arguments import make_parser
from utils.config import known
from utils.errors import UserError, exits_cleanly
from utils.files import write_text

KINDS = results, active_results, factor_traces  # what a report has parts of


def parse(argv):
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="trained on: the folder of results to report")
    parser.add_argument("--backbone", help="report this one alone")
    parser.add_argument("--results", default="results", type=Path, help="folder of all results")
    parser.add_argument("--quiet", action="store_true", help="print nothing but where the page lies")
    return parser.parse_args(argv)


def backbones(folder):
    """The backbones of which a data set's folder has results of any kind: set of names."""
    files = itertools.chain(*(kind.paths(folder) for kind in KINDS))
    return {path.relative_to(folder).parts[0] for path in files}


def folder_of(root, dataset):
    """The folder of what was trained or made on a data set; raises UserError, naming those that there are."""
    there = sorted(path.name for path in root.glob("*") if path.is_dir() and backbones(path))
    if dataset not in there:
        run = f"run `python eval.py --dataset {dataset} --method METHOD` or, of classes, active_learning.py first"
        way_out = run if dataset in known("datasets") else "name one that is"
        have = f"but of {', '.join(there)}" if there else "nor of any other data set"
        raise UserError(f"no results of '{dataset}' are in {root.absolute()}, {have}: {way_out}.")
    return root / dataset


def read(folder, backbone=None):
    """Read what a report has parts of: evaluations, Studies and Traces, a list each; raises UserError without any."""
    found = backbones(folder)
    if backbone not in (None, *found):
        others = ", ".join(sorted(found))
        raise UserError(f"no results in {folder} are of backbone '{backbone}', but of {others}: name one of these.")
    return [kind.read(folder, backbone) for kind in KINDS]


def suffixes(parts):
    """What tells the figures of parts apart: nothing where there is one, and the task only where it must."""
    if len(parts) == 1:
        return [""]
    names = [f"-{part.evaluated_on}-{part.backbone}" for part in parts]
    return [name + f"-{part.task}" * (names.count(name) > 1) for name, part in zip(names, parts, strict=True)]


def write_tables(folder, parts):
    """Write the tables of the parts in every format."""
    for suffix, write in (("md", tables.to_markdown), ("tex", tables.to_latex), ("csv", tables.to_csv)):
        write_text(folder / f"table.{suffix}", write(parts))


@exits_cleanly()
def main(argv=None):
    args = parse(argv)
    folder = folder_of(args.results, args.dataset)
    blocks, studies, traces = read(folder, args.backbone)
    details = next((i for i, block in enumerate(blocks) if block.task == "classification"), len(blocks))
    parts = [*blocks[:details], *results.across(blocks), *blocks[details:], *studies, *traces]
    looks = plots.looks(blocks)
    write_tables(folder, parts)
    for name in plots.EVERY:  # of fewer parts, they may have had other names
        for old in [*folder.glob(f"{name}*.png"), *folder.glob(f"{name}*.pdf")]:
            old.unlink()
    drawings = [
        (draw, folder / f"{name}{suffix}")
        for kind in (blocks, studies, traces)
        for part, suffix in zip(kind, suffixes(kind), strict=True)
        for name, draw in plots.drawings(part, looks).items()
    ]
    for draw, stem in tqdm(drawings, desc="figures", unit="figure", leave=False, disable=args.quiet or None):
        figure = draw()
        if figure:
            plots.save(figure, stem)
    page = folder / "report.html"
    write_text(page, html.page(args.dataset, parts, looks))
    if not args.quiet:
        print(tables.to_text(parts), end="\n\n")
    print(page)


if __name__ == "__main__":
    main()
