"""Turn result files into tables, figures and one page.

    python report.py --dataset shapes

reads results/<trained on>/**/*-retrieval.json, *-classification.json and *-hierarchy.json, and writes into
results/<trained on>: report.html (one self-contained page), table.md, table.tex, table.csv (in long form: a line per
figure), and every figure as .png and .pdf.
"""

from pathlib import Path

from utils import html, plots, results, tables
from utils.arguments import make_parser
from utils.errors import exits_cleanly
from utils.files import write_text


def parse(argv):
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="trained on: the folder of results to report")
    parser.add_argument("--backbone", help="report this one alone")
    parser.add_argument("--results", default="results", type=Path, help="folder of all results")
    parser.add_argument("--quiet", action="store_true", help="print nothing but where the page lies")
    return parser.parse_args(argv)


def suffixes(blocks):
    """What tells the figures of the blocks apart: nothing where there is one, and the task only where it must."""
    if len(blocks) == 1:
        return [""]
    names = [f"-{block.evaluated_on}-{block.backbone}" for block in blocks]
    return [name + f"-{block.task}" * (names.count(name) > 1) for name, block in zip(names, blocks, strict=True)]


def write_tables(folder, blocks):
    """Write the tables of the blocks in every format."""
    for suffix, write in (("md", tables.to_markdown), ("tex", tables.to_latex), ("csv", tables.to_csv)):
        write_text(folder / f"table.{suffix}", write(blocks))


@exits_cleanly()
def main(argv=None):
    args = parse(argv)
    folder = results.folder_of(args.results, args.dataset)
    blocks = results.read(folder, args.backbone)
    looks = plots.looks(blocks)
    write_tables(folder, blocks)
    for name in plots.FIGURES:  # of fewer blocks, they may have had other names
        for old in [*folder.glob(f"{name}*.png"), *folder.glob(f"{name}*.pdf")]:
            old.unlink()
    for block, suffix in zip(blocks, suffixes(blocks), strict=True):
        for name, draw in plots.FIGURES.items():
            figure = draw(block, looks)
            if figure:
                plots.save(figure, folder / f"{name}{suffix}")
    page = folder / "report.html"
    write_text(page, html.page(args.dataset, blocks, looks))
    if not args.quiet:
        print(tables.to_text(blocks), end="\n\n")
    print(page)


if __name__ == "__main__":
    main()
