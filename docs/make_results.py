"""Write the tables of results into README.md and docs/results.md: `python docs/make_results.py [TABLE ... COMMIT]`.

Without arguments they are made anew from docs/results.csv. With the table.csv of reports, such as
results/shapes/table.csv, and the commit that made them, stored figures are replaced first: docs/results.csv by those of
the test split of `shapes`, docs/bayesvlm.csv by those of classes and of active learning, whichever the tables hold.
Rows of `official` presets and of the unified objective that the tables lack stay as they were.
"""

import csv
import re
import sys
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).resolve().parent.parent
FIGURES, CLASSES = HOME / "docs" / "results.csv", HOME / "docs" / "bayesvlm.csv"
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
SPLIT = "shapes+test"  # what is reported: nothing was chosen on it
FIELDS = "table", "row", "column", "seeds", "mean", "sd", "text"
UNTRAINED = ["knn", "kde", "typicality", "density"]  # densities of the bank
METHODS = [
    "clip", "linear", *UNTRAINED, "asymvlm-psd", "asymvlm-vmf", "symmetric-vmf", "probvlm", "pfe", "pcmepp", "prolip",
    "loss-prediction", "bayesvlm",
]  # fmt: skip
OFFICIAL = [f"{name}+official" for name in ("probvlm", "pfe", "pcmepp", "prolip")]
FREE = ["clip, few words", "clip, long embedding"]
STAND_INS = ["clip, entropy", "clip, top probability", "clip, margin", *FREE]
AFTER = {"clip, by top probability": "probability", "clip, by margin": "margin"}  # the row of clip has its entropy
OPTIMAL = "Bayes-optimal"


class Column(NamedTuple):
    """A column of a page's table: where its figures stand in a report's table.csv, and how they are printed."""

    title: str
    table: str
    column: str
    digits: int = 3
    spread: bool = True  # print the s.d. over seeds


R1, R1_INTERVAL = "text_to_image_r1", "text_to_image_r1_interval"
SPEARMAN = Column("Spearman with ambiguity, query-only", "truth", "query_spearman")
TREND = Column(f"{MINUS}S·R²", "uncertainty", "text_to_image_minus_s_r2")
OF_ENTROPY = Column("Spearman, entropy", "truth", "entropy_spearman")
QUERY = Column("AUROC, query-only", "selective", "text_to_image_query_auroc")
ENTROPY = Column("AUROC, entropy", "selective", "text_to_image_entropy_auroc")
CHAINS = Column("chains that fall, %", "hierarchy", "falling_chains", 1)
IMAGE_R1 = Column("R@1 image→text, %", "recall", "image_to_text_r1", 1)
FULL = [
    Column("R@1 text→image, %", "recall", R1, 1),
    Column("interval", "recall", R1_INTERVAL, 1),
    Column("of the limit, %", "recall", "text_to_image_share_of_limit", 1),
    IMAGE_R1,
    Column("interval", "recall", "image_to_text_r1_interval", 1),
    SPEARMAN, OF_ENTROPY, TREND, QUERY, ENTROPY, CHAINS,
]  # fmt: skip
# By page and name of the table: its rows and its columns.
TABLES = {
    ("README.md", "summary"): (
        [*FREE, *AFTER, *(name for name in METHODS if name not in ("linear", "knn", "kde", "typicality"))],
        [
            column._replace(title=title, spread=False)
            for column, title in (
                (Column("", "recall", R1, 1), "R@1, %"),
                (SPEARMAN, "Spearman with ambiguity, before the search"), (OF_ENTROPY, "after"),
                (QUERY, "AUROC, before"), (ENTROPY, "after"),
            )
        ],
    ),
    ("docs/results.md", "native"): ([*METHODS, OPTIMAL], FULL),
    ("docs/results.md", "free"): (
        [*STAND_INS, OPTIMAL],
        [
            SPEARMAN._replace(title="Spearman with ambiguity"), TREND,
            Column("AUROC", "", "auroc"), Column("FPR95", "", "fpr95_right"), Column("log score", "", "log_score"),
            CHAINS,
        ],
    ),
    ("docs/results.md", "differences"): (
        [*METHODS[1:], *OFFICIAL, *FREE],
        [
            Column("R@1 text→image less clip's, points", "gains", "gain_text_to_image_r1_less", 1),
            Column("R@1 image→text, points", "gains", "gain_image_to_text_r1_less", 1),
            Column("AUROC query-only less clip's entropy", "gains", "gain_query_auroc_less"),
            Column("AUROC of entropy", "gains", "gain_entropy_auroc_less"),
        ],
    ),
    ("docs/results.md", "calibration"): (
        METHODS,
        [
            Column("ECE text→image", "calibration", "text_to_image_ece_15"),
            Column("interval", "calibration", "text_to_image_ece_15_interval"),
            Column("by chance", "calibration", "text_to_image_ece_15_expected", spread=False),
            Column("after temperature scaling", "calibration", "text_to_image_ece_15_scaled"),
            Column("NLL", "calibration", "text_to_image_nll"),
            Column("ECE image→text", "calibration", "image_to_text_ece_15"),
            Column("after scaling", "calibration", "image_to_text_ece_15_scaled"),
        ],
    ),
    ("docs/results.md", "selective"): (
        [*METHODS, *FREE],
        [
            Column("AURC", "selective", "text_to_image_query_aurc"),
            Column("AUGRC", "selective", "text_to_image_query_augrc"),
            Column("FPR95", "selective", "text_to_image_query_fpr95_right"),
            Column("log score", "selective", "text_to_image_query_log_score"),
            Column("coverage at 5 % risk, %", "selective", "text_to_image_query_coverage_at_5", 1),
            Column("entropy: AURC", "selective", "text_to_image_entropy_aurc"),
            Column("FPR95", "selective", "text_to_image_entropy_fpr95_right"),
            Column("log score", "selective", "text_to_image_entropy_log_score"),
            Column("coverage at 5 % risk, %", "selective", "text_to_image_entropy_coverage_at_5", 1),
        ],
    ),
    ("docs/results.md", "infonce"): (
        ["pfe+infonce", "pcmepp+infonce", "prolip+infonce"],
        [column for column in FULL if column.title != "interval"],
    ),
    ("docs/results.md", "official"): (
        OFFICIAL,
        [column for column in FULL if column.title != "interval"],
    ),
}  # fmt: skip
OF_CLASSES = {  # by task of a report: which columns are stored, and of which tables
    "classification": r"classification/(acc|nll|ece_15|(query|entropy)_auroc|(acc|query_auroc|entropy_auroc)_interval)",
    "comparison": r"differences_\w+/.*_gap",
    "active": r"(accuracy|nll|ece)/\w+_(50|100|mean)(_gap)?",
}
KEYS = {"clip, entropy": "entropy", "clip, top probability": "probability", "clip, margin": "margin"}


def read(path=FIGURES):
    """The stored figures: {(table, row, column): dict of FIELDS}, and the commit that made them."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = {(row["table"], row["row"], row["column"]): row for row in csv.DictReader(file)}
    return rows, rows.pop(("commit", "", ""))["text"]


def place(column, row):
    """Where the figure of a row stands in a report: (table, row, column)."""
    if row in AFTER and "entropy" in column.column:
        return column.table, "clip", column.column.replace("entropy", AFTER[row])
    if column.table:
        row = row.removeprefix("clip, ") if column.table == "hierarchy" else row
        return column.table, row, column.column
    if row in KEYS:  # an uncertainty of the posterior has columns of its own in the row of clip
        return "selective", "clip", f"text_to_image_{KEYS[row]}_{column.column}"
    return "selective", row, f"text_to_image_query_{column.column}"


def needed():
    """All places that a page prints."""
    return {place(column, row) for rows, columns in TABLES.values() for row in rows for column in columns}


def cell(figure, column):
    """Print a figure: its mean and the s.d. over its seeds, or its text; a dash without one."""
    if figure is None:
        return NONE
    if figure["text"]:
        return figure["text"]

    def number(value):
        return f"{round(float(value), column.digits) + 0.0:.{column.digits}f}".replace("-", MINUS)

    return number(figure["mean"]) + (f" ± {number(figure['sd'])}" if column.spread and float(figure["sd"] or 0) else "")


def table(name, figures):
    """One table of a page as Markdown."""
    rows, columns = TABLES[name]
    lines = [f"| method | {' | '.join(column.title for column in columns)} |", f"|:--|{'--:|' * len(columns)}"]
    for row in rows:
        cells = [cell(figures.get(place(column, row)), column) for column in columns]
        lines.append(f"| {f'*{row}*' if row == OPTIMAL else row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pages():
    """The pages with their tables made anew: {path: text}."""
    figures, commit = read()
    texts = {}
    for page, name in TABLES:
        path = HOME / page
        text = texts.get(path) or path.read_text(encoding="utf-8")
        block = f"<!-- {name} -->\n{table((page, name), figures)}\n<!-- end -->"
        pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
        if not re.search(pattern, text, re.DOTALL):
            raise SystemExit(f"{page} has no place for the table '{name}': <!-- {name} --> ... <!-- end -->.")
        text = re.sub(pattern, lambda _, block=block: block, text, count=1, flags=re.DOTALL)
        texts[path] = re.sub(r"at commit `[0-9a-f]{7}`", f"at commit `{commit}`", text)
    return texts


def store(*paths, commit):
    """Replace the stored figures by those of reports' table.csv; of classes, `table` begins with what they are of."""
    rows = []
    for path in paths:
        with open(path, encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    kept = needed()
    of_shapes = [
        row for row in rows if (row["table"], row["row"], row["column"]) in kept and row["evaluated_on"] == SPLIT
    ]
    of_classes = [
        row | {"table": f"{row['evaluated_on']} {row['table']}"}
        for row in rows
        if re.fullmatch(OF_CLASSES.get(row["task"], "none"), f"{row['table']}/{row['column']}")
    ]
    if of_shapes:
        made = {row["row"] for row in of_shapes}
        stored = read()[0].values()
        of_shapes += [row for row in stored if "+" in row["row"] and row["row"] not in made]
    for path, figures in ((FIGURES, of_shapes), (CLASSES, of_classes)):
        if figures:
            write(path, figures, commit)


def write(path, rows, commit):
    """Write rows of figures, and the commit that made them."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerow(dict.fromkeys(FIELDS, "") | {"table": "commit", "text": commit})
        writer.writerows(rows)


def main(argv):
    if argv:
        store(*argv[:-1], commit=argv[-1])
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
