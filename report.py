"""Turn result files into tables, figures and one page.

    python report.py --dataset shapes

reads results/<trained on>/**/*-<task>.json of eval.py, active/** of active_learning.py and factor-trace.json of
benchmarks/factor_trace.py, whichever there are, and writes into results/<trained on>: report.html (one self-contained
page), table.md, table.tex, table.csv (in long form: a line per figure), and every figure as .png and .pdf.
"""

import utils.interrupt  # noqa: F401

# isort: split
from pathlib import Path

from utils.arguments import make_parser
from utils.config import known
from utils.errors import UserError, exits_cleanly


@exits_cleanly()
def parse(argv=None):
    """The flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="trained on: the folder of results to report")
    parser.add_argument("--backbone", help="report the results of this backbone only")
    parser.add_argument("--results", default="results", type=Path, help="folder of all results")
    parser.add_argument("--quiet", action="store_true", help="print nothing but where the page lies")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # --help and wrong flags end here, before the seconds in which matplotlib loads

import itertools

from tqdm import tqdm

from reporting import evaluations, page, rendering, studies, traces
from reporting.figures import style
from reporting.runs import OF_EVAL
from reporting.tables import formats
from utils.files import write_text

KINDS = evaluations, studies, traces  # modules of the kinds of parts, see reporting/parts.py


def backbones(folder):
    """The backbones of which a data set's folder has results of any kind: set of names."""
    files = itertools.chain(*(kind.paths(folder) for kind in KINDS))
    return {path.relative_to(folder).parts[0] for path in files}


def folder_of(root, dataset):
    """The folder of what was trained or made on a data set; raises UserError, naming those that there are."""
    present = sorted(path.name for path in root.glob("*") if path.is_dir() and backbones(path))
    if dataset not in present:
        run = f"run `python eval.py --dataset {dataset} --method METHOD` or, for classes, active_learning.py first"
        way_out = run if dataset in known("datasets") else "name one that is"
        others = f"but of {', '.join(present)}" if present else "nor of any other data set"
        raise UserError(f"no results of '{dataset}' are in {root.absolute()}, {others}: {way_out}.")
    return root / dataset


def read(folder, backbone=None):
    """Read the parts of a report, a list for each of KINDS; raises UserError where there are none."""
    present = backbones(folder)
    if backbone not in (None, *present):
        others = ", ".join(sorted(present))
        raise UserError(f"no results in {folder} are of backbone '{backbone}', but of {others}: name one of these.")
    return [kind.read(folder, backbone) for kind in KINDS]


def suffixes(parts):
    """What tells the figures of parts apart: nothing for a single part, and the task only where it must."""
    if len(parts) == 1:
        return [""]
    names = [f"-{part.evaluated_on}-{part.backbone}" for part in parts]
    return [f"{name}-{part.task}" if names.count(name) > 1 else name for name, part in zip(names, parts, strict=True)]


def write_tables(folder, parts):
    """Write the tables of the parts in every format."""
    for suffix, write in (("md", formats.to_markdown), ("tex", formats.to_latex), ("csv", formats.to_csv)):
        write_text(folder / f"table.{suffix}", write(parts))


def stems(folder, kinds):
    """The files of all figures, without their suffixes: {(number of the part, name of the figure): path}."""
    paths, number = {}, itertools.count(1)
    for parts in kinds:
        numbers = [next(number) for _ in parts]
        drawn = [(i, part) for i, part in zip(numbers, parts, strict=True) if style.drawings(part)]
        for (i, part), suffix in zip(drawn, suffixes([part for _, part in drawn]), strict=True):
            paths |= {(i, drawing.name): folder / f"{drawing.name}{suffix}" for drawing in style.drawings(part)}
    return paths


@exits_cleanly()
def main(argv=None):
    args = parse(argv)
    folder = folder_of(args.results, args.dataset)
    kinds = read(folder, args.backbone)
    parts = [part for parts in kinds for part in parts]
    looks = style.looks([part for part in parts if part.task in OF_EVAL])
    for name in style.names():  # of an earlier report, which may have had other parts
        for old in [*folder.glob(f"{name}*.png"), *folder.glob(f"{name}*.pdf")]:
            old.unlink()
    paths = stems(folder, kinds)
    with rendering.in_processes(parts, looks, paths) as drawn:
        write_tables(folder, parts)
        options = {"desc": "figures", "unit": "figure", "leave": False, "disable": args.quiet or None}
        figures = dict(tqdm(drawn, total=len(paths), **options))
    text = page.page(args.dataset, parts, looks, figures)
    write_text(folder / "report.html", text)
    if not args.quiet:
        print(formats.to_text(parts), end="\n\n")
    print(folder / "report.html")


if __name__ == "__main__":
    main()
