"""Tables of small synthetic results: numbers against hand computation, and every format read back."""

import csv
import io
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import made_once, put

import report
from reporting import evaluations, tables
from reporting.runs import TASKS, Result, baseline_of
from reporting.tables import columns, formats, published
from reporting.words import NONE, RETRIEVAL
from utils.config import HOME
from utils.errors import UserError

LEVELS = 4
RECALLS = {"clip": (0.25, 0.30, 0.20), "pfe": (0.10, 0.40, 0.25), "a_b+50%": (0.30,)}
UNCERTAIN = {"pfe": (-0.8, -0.9, -1.0), "a_b+50%": (-0.2,)}  # S of each seed
GALLERY_AWARE = {"top": 0.5, "margin": 0.875, "entropy": 0.75, "probability": 0.25}  # AUROC of each
ERRORS = {"ece_15": 0.2, "ece_20": 0.25, "adaptive_ece": 0.125, "nll": 2.0, "brier": 0.5}
DATA, BACKBONE = "shapes", "tiny"


def record(family, auroc, s=None, recall=0.5, limit=None, count=25, levels=LEVELS, **more):
    """The entry of one uncertainty in a result; without s it is constant over the queries."""
    values = {"family": family, "auroc": auroc, "aupr": 0.5, "aurc": 0.25, "e_aurc": 0.125}
    values["selective_recall"] = {"80": 0.8, "90": 0.7, "95": 0.6}
    if s is None:
        return values | {"constant": True}
    steps = range(1, levels + 1)
    values["levels"] = {"count": [count] * levels, "uncertainty": [[step, step + 0.5] for step in steps]}
    values["levels"]["recall"] = {k: [recall / step for step in steps] for k in ("1", "5", "10")}
    values["levels"] |= {} if limit is None else {"bayes_recall": [limit] * levels}
    trend = {"s": s, "r2": 0.5, "minus_s_r2": -0.5 * s, "spread": 0.25}
    interval = {name: [-1.0, 1.0] for name in (*trend, "auroc")} | {"level_recall": [[0.0, 1.0]] * levels}
    return values | {"interval": interval} | trend | more


def make_side(recall, s=None, by="query", truth=False, constant=False, count=25, levels=LEVELS):
    """One direction of a result. s: of the method's uncertainty, None without one. by: whose uncertainty that is."""
    limit, ambiguity = (0.5, {"spearman": 0.75, "kendall": 0.5}) if truth else (None, {})
    options = {"recall": recall, "limit": limit, "count": count, "levels": levels}
    uncertainty = {name: record("gallery-aware", value, -0.9, **options) for name, value in GALLERY_AWARE.items()}
    if s is not None:
        family = "query-only" if by == "query" else "gallery-aware"
        uncertainty[by] = record(family, 0.625, None if constant else s, **options, **({} if constant else ambiguity))
    reliability = {name: [1, 2] for name in ("count", "confidence", "accuracy")}
    model = ERRORS | {"scales": [10.0], "reliability": reliability}
    card = {"query": "a ring", "own": "gone.png", "uncertainty": 0.1}
    card["best"] = [{"answer": "gone.png", "score": 1.0, "right": True}]
    side = {"queries": 100, "recall": {"1": recall, "5": 0.5, "10": 0.75}, "median_rank": 7.0}
    side |= {"levels_by": None if s is None else by, "uncertainty": uncertainty}
    side["calibration"] = {"model": model, "temperature": model | {name: value / 2 for name, value in ERRORS.items()}}
    side["examples"] = {"most_certain": [card], "least_certain": [card]}
    if truth:
        side |= {"bayes_recall": limit, "regret": limit - recall, "map_at_r": 0.375, "r_precision": 0.25}
    return side


def chains(steps=0.75, **query):
    """The entry of chains of prompts in a result. query: figures of the method's uncertainty, if it has one."""
    figures = {"falling_steps": steps, "falling_chains": 0.5, "spearman_depth": -0.5}
    figures |= {"spearman_depth_within_chains": -0.75, "mean_by_depth": {"0": 2.0, "1": 1.0}}
    free = {"long embedding": figures | {"falling_steps": 0.8}, "few words": figures | {"falling_steps": 1.0}}
    return {"chains": 10, "prompts": 40, "uncertainty": ({"query": figures | query} if query else {}) | free}


def make_result(
    variant, seed=0, recall=0.25, s=None, task="retrieval", truth=False, to_text=None, levels=LEVELS, **changes
):
    """The values of a result file. to_text: the direction image->text. changes: values to replace or add."""
    objective = "infonce" if "infonce" in variant.split("+") else "native"
    config = {"backbone": BACKBONE, "method": variant.partition("+")[0], "seed": seed, "objective": objective}
    config |= {"score": "similarity", "model": {}, "optim": {}, "train": {"batch_size": 8, "epochs": 2}}
    result = {"task": task, "evaluated_on": DATA, "split": "test", "uncer_levels": levels, "levels_by": None}
    result |= {"drop_remainder": False, "images": 20, "captions": 100, "classes": 0, "skipped": 0}
    result |= {"seen_in_training": 0, "fingerprint": "f", "checkpoint": "c", "variant": variant, "config": config}
    if task == "retrieval":
        result |= {"score": "similarity", "posterior_scale": 10.0, "rsum": 300.0}
        result["text_to_image"] = make_side(recall, s, truth=truth, levels=levels)
        result["image_to_text"] = to_text or make_side(0.5, s, truth=truth, count=5, levels=levels)
        if truth:
            best = {"levels": [1.0, 0.5, 0.25, 0.125], "s": -1.0, "r2": 0.9, "minus_s_r2": 0.9, "spread": 0.875}
            result["bayes_optimal"] = best
    if task == "classification":
        result |= {"classes": 10, "score": "similarity", "posterior_scale": 10.0}
        result["image_to_class"] = make_side(recall, s, truth=truth)
    if task == "hierarchy":
        result["hierarchy"] = chains(**({} if s is None else {"falling_steps": -s}))
    return result | changes


def save(folder, result):
    """Write a result where eval.py does, and return its path."""
    config = result["config"]
    path = folder / "shapes" / config["backbone"] / result["variant"] / f"seed{config['seed']}"
    path = path / f"{result['evaluated_on']}-{result['task']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    spread, depth = np.linspace(0, 1, 100), np.tile(np.arange(4), 10)
    arrays = {"chain": np.repeat(np.arange(10), 4), "depth": depth, "chain_uncertainty": -depth.astype(float)}
    arrays |= {"ambiguity": np.log(np.arange(1, 101)), "text_uncertainty": spread, "image_uncertainty": spread[:20]}
    for side in ("text_to_image", "image_to_text", "image_to_class"):
        arrays |= {f"{side}_{name}": spread for name in ("uncertainty", "entropy", "top", "margin", "probability")}
        arrays |= {f"{side}_hit": np.tile([0.0, 1.0], 50), f"{side}_limit": spread}
    for probabilities in ("model", "temperature"):
        arrays |= {f"image_to_class_{probabilities}_{name}": spread for name in ("nll", "confidence", "hit")}
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    return path


def write(folder, *args, **options):
    return save(folder, make_result(*args, **options))


def both_scores(ranking, other):
    """The entries of a result evaluated by both scores: `ranking` ranked, and the other score has R@1 `other`."""
    name = {"similarity": "log_likelihood", "log_likelihood": "similarity"}[ranking]
    part = make_side(other, truth=True)
    return {"score": ranking, "other_score": {"score": name, "text_to_image": part, "image_to_text": part}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of three variants: one has no uncertainty, one a single seed and a name that needs escaping."""

    def make():
        for variant, recalls in RECALLS.items():
            for seed, recall in enumerate(recalls):
                auroc = UNCERTAIN[variant][seed] if variant in UNCERTAIN else None
                write(Path.cwd(), variant, seed, recall, auroc, truth=True)
        report.main(["--dataset", "shapes", "--results", str(Path.cwd()), "--quiet"])

    return made_once(tmp_path_factory, "report", make)


@pytest.fixture
def block(folder):
    return evaluations.read(folder / "shapes")[0]


def blocks_of(folder):
    """The evaluations in a folder of results, without comparisons over data sets."""
    return [part for part in evaluations.read(folder / "shapes") if part.task in TASKS]


def tables_of(*blocks):
    """The tables of blocks by name, in order; each name occurs once."""
    tables = [table for block in blocks for table in block.tables]
    by_name = {table.name: table for table in tables}
    assert len(by_name) == len(tables)
    return by_name


def table_of(folder, name):
    """The table with this name in a folder of results."""
    return tables_of(*blocks_of(folder))[name]


def rows_of(table):
    return {row.name: row for _, rows in table.groups for row in rows}


def mean(table, row, key):
    """The mean in a table's cell, None without one."""
    cell = rows_of(table)[row].cells.get(key)
    return cell and cell.mean


def text_of(folder, name):
    return (folder / "shapes" / name).read_text(encoding="utf-8")


def csv_of(folder):
    """The long table: dict of (table, row, column) to its line."""
    lines = csv.DictReader(io.StringIO(formats.to_csv(blocks_of(folder))))
    return {(line["table"], line["row"], line["column"]): line for line in lines}


def fails(folder, capsys, *more, dataset="shapes"):
    """Run report.py; returns the one sentence of its error."""
    with pytest.raises(SystemExit) as error:
        report.main(["--dataset", dataset, "--results", str(folder), *more])
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1
    return message


def test_mean_and_deviation_are_those_over_seeds(block):
    rows = rows_of(tables_of(block)["recall"])
    assert list(rows) == ["clip", "a_b+50%", "pfe", "Bayes-optimal"]  # without an uncertainty first, then by name
    cell = rows["pfe"].cells["text_to_image_r1"]
    assert cell.mean == pytest.approx(25) and cell.sd == pytest.approx(15)  # of 10, 40, 25
    assert rows["pfe"].cells["text_to_image_share_of_limit"].mean == pytest.approx(50)
    assert rows["a_b+50%"].cells["text_to_image_r1"].sd is None
    assert [row.seeds for row in rows.values()] == [3, 1, 3, None] and block.summary == "mean ± s.d. over 1 to 3 seeds"


def test_best_is_the_highest_value_or_the_lowest_s_and_includes_ties(block):
    recall, uncertainty = (tables_of(block)[name] for name in ("recall", "uncertainty"))

    def best(table, key):
        return {row.name for row in rows_of(table).values() if key in row.cells and row.cells[key].best}

    assert best(recall, "text_to_image_r1") == {"a_b+50%"} and best(recall, "image_to_text_r1") == set()
    # Only query-only uncertainties compete; clip's three confidences need the gallery.
    assert best(uncertainty, "text_to_image_s") == best(uncertainty, "text_to_image_minus_s_r2") == {"pfe"}
    assert best(uncertainty, "text_to_image_r2") == set()
    assert not any(cell.best for cell in rows_of(recall)["Bayes-optimal"].cells.values())


def test_alone_nothing_is_best(tmp_path):
    write(tmp_path, "pfe", 0, 0.3, -0.5)
    (block,) = blocks_of(tmp_path)
    cells = [cell for table in block.tables for row in rows_of(table).values() for cell in row.cells.values()]
    assert cells and not any(cell.best for cell in cells) and block.summary == "one seed"


def test_values_that_print_alike_tie(tmp_path):
    for variant, recall in (("a", 0.3), ("b", 0.3004), ("c", 0.299)):
        write(tmp_path, variant, 0, recall)
    rows = rows_of(table_of(tmp_path, "recall")).values()
    assert [row.cells["text_to_image_r1"].best for row in rows] == [True, True, False]


@pytest.mark.parametrize(("value", "text"), [(-0.0, "0.0"), (-0.04, "0.0"), (-0.06, "-0.1"), (12.25, "12.2")])
def test_zero_has_no_sign(value, text):
    assert tables.number(value, 1) == text


def markdown_tables(folder):
    """The Markdown tables of a report, each a list of lines with the same number of cells."""
    parts = [part.strip().splitlines() for part in text_of(folder, "table.md").split("\n\n") if part.startswith("|")]
    assert all(len({line.replace("\\|", "").count("|") for line in lines}) == 1 for lines in parts)
    return parts


def test_markdown(folder):
    names = list(tables_of(*blocks_of(folder)))
    assert names[:3] == ["gains", "recall", "uncertainty"]
    recall, uncertainty = markdown_tables(folder)[1:3]
    clip, escaped, _, limit = recall[2:]
    assert clip.startswith("| [clip](<tiny/clip>) | 3 | 25.0 ± 5.0 |")
    assert limit.startswith(f"| *Bayes-optimal* |  | 50.0 {f'| {NONE} ' * 3}|") and "**" not in limit
    assert "a\\_b+50%" in escaped and "(<tiny/a_b+50%>)" in escaped
    entropy, _, _, _, _, pfe, limit = uncertainty[2:]
    assert entropy.startswith("| [clip, entropy](<tiny/clip>) | 3 | entropy | -0.900 ± 0.000 |")
    assert pfe.endswith("| query caption | **-0.900** ± 0.100 | 0.500 ± 0.000 | **0.450** ± 0.050 |")
    assert "**" not in limit
    text = text_of(folder, "table.md")
    assert text.startswith("## shapes, tiny: retrieval\n") and "- S: rank correlation of uncertainty level" in text


def test_no_cell_of_the_csv_is_a_formula(tmp_path):
    """Names come from data and flags; figures with a sign stay what they are."""
    for name in ("=cmd|'/C calc'!A0", "+1+cmd", "-2+3+cmd|' /C calc'!A0", "@SUM(1)", "pfe"):
        write(tmp_path, name.replace("/", ":"), 0, 0.3, -0.5)
    lines = list(csv.reader(formats.to_csv(blocks_of(tmp_path)).splitlines()))
    assert not [line for line in lines for name in line[:8] if name[:1] in tuple("=+-@")]
    assert {"'=cmd|':C calc'!A0", "'@SUM(1)", "pfe"} < {line[4] for line in lines}


def test_latex_escapes_balances_and_fits(folder):
    text = text_of(folder, "table.tex")
    assert r"a\_b+50\% & $\mathbf{30.0}$ &" in text and r"$25.0 {\scriptstyle\pm 15.0}$" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{table}") and text.isascii()
    unescaped = text.replace(r"\{", "").replace(r"\}", "")
    assert unescaped.count("{") == unescaped.count("}")
    for panel in text.split(r"\begin{tabular}{@{}l")[1:]:
        columns = panel.index("@{}}")
        lines = [line for line in panel.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert {line.replace(r"\&", "").count("&") for line in lines} == {columns}
    assert formats._in_latex(r"\~^{$&#") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}\{\$\&\#"


def test_csv_holds_the_exact_numbers(folder):
    lines = csv_of(folder)
    assert text_of(folder, "table.csv").startswith("evaluated_on,backbone,task,table,row,variant,seeds,column,mean,sd,")
    for variant, recalls in RECALLS.items():
        percent = [100 * recall for recall in recalls]
        line = lines["recall", variant, "text_to_image_r1"]
        assert float(line["mean"]) == statistics.fmean(percent)
        assert float(line["sd"]) == statistics.stdev(percent) if len(recalls) > 1 else line["sd"] == ""
    assert lines["recall", "Bayes-optimal", "text_to_image_r1"]["seeds"] == ""
    assert float(lines["uncertainty", "pfe", "text_to_image_s"]["mean"]) == statistics.fmean(UNCERTAIN["pfe"])
    assert lines["uncertainty", "clip, top score", "image_to_text_levels_by"]["text"] == "top score"
    # Columns of the CSV alone.
    assert float(lines["recall", "pfe", "text_to_image_median_rank"]["mean"]) == 7
    assert float(lines["uncertainty", "pfe", "text_to_image_s_low"]["mean"]) == -1
    assert float(lines["selective", "clip", "image_to_text_margin_auroc"]["mean"]) == 0.875
    assert float(lines["calibration", "pfe", "image_to_text_nll_scaled"]["mean"]) == 1
    assert {line["variant"] for line in lines.values()} == {*RECALLS, ""}


def test_terminal_shows_aligned_tables(block):
    text = formats.to_text([block])
    row = next(line for line in text.splitlines() if line.startswith("pfe") and "25.0" in line)
    head = next(line for line in text.splitlines() if "R@1" in line and "R@5" in line)
    assert row.index("25.0 ± 15.0") + len("25.0 ± 15.0") == head.index("R@1") + len("R@1")
    assert "-0.900 ± 0.100*" in text and max(map(len, text.splitlines())) <= formats.TERMINAL
    text.encode("cp1252")  # a Windows terminal prints it


def test_a_wide_table_is_split_into_panels_of_whole_groups():
    def column(number, group):
        return tables.Column(f"{group}{number}", group, f"title {number}", 1, None)

    groups = {"first": 4, "second": 4, "third": 9}
    wide = [column(i, group) for group, size in groups.items() for i in range(size)]
    row = tables.Row("method", None, None, {one.key: tables.Cell(0.5) for one in wide})
    table = tables.Table("name", "Title", "", wide, [("", [row])])
    split = formats.panels(table, 60)
    assert [one.key for panel in split for one in panel] == [one.key for one in wide]
    assert [{one.group for one in panel} for panel in split] == [{"first"}, {"second"}, {"third"}, {"third"}]
    assert [len(panel) for panel in formats.panels(table, 120)] == [8, 9]


def test_either_score_fills_the_column_of_its_name(tmp_path):
    write(tmp_path, "cosine", 0, 0.3, truth=True, **both_scores("similarity", 0.4))
    write(tmp_path, "likelihood", 0, 0.3, truth=True, **both_scores("log_likelihood", 0.4))
    write(tmp_path, "one", 0, 0.3, truth=True)
    write(tmp_path, "seeds", 0, 0.3, truth=True, **both_scores("similarity", 0.4))
    write(tmp_path, "seeds", 1, 0.3, truth=True)
    recall = table_of(tmp_path, "recall")
    cells = {name: row.cells for name, row in rows_of(recall).items()}
    keys = ["text_to_image_r1_by_cosine", "text_to_image_r1_by_likelihood"]
    assert [column.key for column in recall.columns[-2:]] == keys
    assert [cells["cosine"][key].mean for key in keys] == pytest.approx([30, 40])
    assert [cells["likelihood"][key].mean for key in keys] == pytest.approx([40, 30])
    assert [cells["cosine"][key].best for key in keys] == [False, True]
    assert [cells["Bayes-optimal"][key].mean for key in keys] == pytest.approx([50, 50])
    assert not any(key in cells[name] for key in keys for name in ("one", "seeds"))  # a seed lacks the other score


def test_uncertainty_names_what_defines_the_levels(tmp_path):
    write(tmp_path, "clip", 0, 0.3)
    write(tmp_path, "asymmetric", 0, 0.3, -0.5, to_text=make_side(0.5, -0.25, "retrieved", count=5))
    write(tmp_path, "symmetric", 0, 0.3, -0.5)
    table = table_of(tmp_path, "uncertainty")
    rows = rows_of(table)
    assert list(rows) == [
        "clip, entropy", "clip, top probability", "clip, top score", "clip, margin", "asymmetric", "symmetric"
    ]  # fmt: skip
    by = {name: [row.cells[f"{side}_levels_by"].text for side in RETRIEVAL] for name, row in rows.items()}
    assert by["symmetric"] == ["query caption", "query image"] and by["clip, margin"] == ["margin", "margin"]
    assert by["asymmetric"] == ["query caption", "retrieved caption"]
    assert mean(table, "asymmetric", "image_to_text_s") == -0.25
    assert mean(table, "clip, margin", "text_to_image_s") == -0.9
    assert "Over 4 levels of uncertainty, of 25 captions and of 5 images." in table.note
    heads = [column.group for column in table.columns]
    assert heads == ["image→text"] * 4 + ["text→image"] * 4  # side by side, as in the paper


def test_constant_uncertainty_has_a_note_and_no_figures(tmp_path):
    flat = make_side(0.5, -0.5, constant=True, count=5)
    write(tmp_path, "pfe", 0, 0.3, -0.5, to_text=flat)
    write(tmp_path, "prolip", 0, 0.3, -0.5)
    for name in ("uncertainty", "levels"):
        table = table_of(tmp_path, name)
        assert table.note.endswith("All queries are equally uncertain, so there are no figures: pfe (image→text).")
    table = table_of(tmp_path, "uncertainty")
    assert mean(table, "pfe", "image_to_text_s") is None and mean(table, "prolip", "image_to_text_s") == -0.5
    lines = formats.to_text(blocks_of(tmp_path)).splitlines()
    assert any(line.split()[:6] == ["pfe", "query", "image", *[NONE] * 3] for line in lines)


def test_selective_separates_both_families(tmp_path):
    write(tmp_path, "clip", 0, 0.3)
    write(tmp_path, "asymmetric", 0, 0.3, -0.5, to_text=make_side(0.5, -0.25, "retrieved", count=5))
    table = table_of(tmp_path, "selective")
    assert [name for name, _ in tables.spans([column.group for column in table.columns])] == [
        "query-only",
        "gallery-aware: entropy",
        "gallery-aware: AUROC",
    ]
    assert [column.title for column in table.columns[:3]] == ["AUROC", "AURC", "R@1 of 80 %"]
    assert mean(table, "asymmetric", "text_to_image_query_auroc") == 0.625
    assert mean(table, "clip", "text_to_image_query_auroc") is None
    assert mean(table, "clip", "text_to_image_entropy_of_surest_80") == pytest.approx(80)
    assert mean(table, "asymmetric", "image_to_text_retrieved_auroc") == 0.625  # in the CSV
    # The uncertainty of a retrieved caption depends on the gallery.
    assert mean(table, "asymmetric", "image_to_text_query_auroc") is None
    assert "Bayes-optimal" not in rows_of(table)  # it has no confidence


def test_where_all_answers_are_wrong_there_is_no_auroc(tmp_path):
    result = make_result("lost", 0, 0.0, -0.5)
    for side in RETRIEVAL:
        for uncertainty in result[side]["uncertainty"].values():
            uncertainty |= dict.fromkeys(("auroc", "aupr", "s", "r2", "minus_s_r2"))
    save(tmp_path, result)
    titles = {column.title for column in table_of(tmp_path, "selective").columns}
    assert "AURC" in titles and not titles & {"AUROC", "AUPR"}
    assert [column.title for column in table_of(tmp_path, "uncertainty").columns] == ["levels by"] * 2
    report.main(["--dataset", "shapes", "--results", str(tmp_path), "--quiet"])


def test_truth(tmp_path):
    write(tmp_path, "clip", 0, 0.3, truth=True, hierarchy=chains())
    write(tmp_path, "pfe", 0, 0.2, -0.5, truth=True, hierarchy=chains(falling_steps=0.9))
    table = table_of(tmp_path, "truth")
    assert [mean(table, "pfe", key) for key in ("query_spearman", "query_kendall")] == [0.75, 0.5]
    keys = ("text_to_image_regret", "text_to_image_map_at_r", "image_to_text_r_precision")
    assert [mean(table, "pfe", key) for key in keys] == pytest.approx([30, 37.5, 25])
    assert mean(table, "clip", "query_spearman") is None
    steps = table_of(tmp_path, "hierarchy")
    assert [mean(steps, name, "falling_steps") for name in ("clip", "pfe", "few words")] == [None, 90, 100]
    cells = {name: row.cells for name, row in rows_of(table).items()}
    assert cells["clip"]["text_to_image_regret"].best and not cells["pfe"]["text_to_image_regret"].best


def test_levels_with_their_limits(tmp_path):
    write(tmp_path, "clip", 0, 0.3, truth=True)
    for seed, recall in enumerate((0.3, 0.4)):
        write(tmp_path, "pfe", seed, recall, -0.5, truth=True)
    table = table_of(tmp_path, "levels")
    assert [column.title for column in table.columns] == ["levels by", "1", "2", "3", "4"] * 2
    assert rows_of(table)["pfe, limit"].cells["image_to_text_levels_by"].text == "query image"
    names = ("clip, entropy", "clip, top probability", "clip, top score", "clip, margin", "pfe")
    assert list(rows_of(table)) == [*(name + limit for name in names for limit in ("", ", limit")), "Bayes-optimal"]
    keys = [f"text_to_image_level_{level}" for level in (1, 2, 3, 4)]
    assert [mean(table, "pfe", key) for key in keys] == pytest.approx([35, 35 / 2, 35 / 3, 35 / 4])
    assert [mean(table, "pfe, limit", key) for key in keys] == pytest.approx([50] * 4)
    assert [mean(table, "Bayes-optimal", key) for key in keys] == pytest.approx([100, 50, 25, 12.5])
    assert mean(table, "Bayes-optimal", "image_to_text_level_1") is None
    assert "of 25 captions and of 5 images." in table.note
    assert not any(cell.best for row in rows_of(table).values() for cell in row.cells.values())


def test_sizes_of_levels_differ_by_one_at_most(tmp_path):
    result = make_result("pfe", 0, 0.3, -0.5)
    for uncertainty in result["text_to_image"]["uncertainty"].values():
        uncertainty["levels"]["count"] = [26, 25, 25, 25]
    save(tmp_path, result)
    assert "of 25 or 26 captions and of 5 images" in table_of(tmp_path, "levels").note


def coco_figures():
    """The entry `coco` of a result: 10 % for every figure of text->image, 30 % for image->text."""
    names = [f"{name}_r{k}" for name in ("coco_1k", "coco_5k", "cxc") for k in (1, 5, 10)]
    names += ["eccv_r1", "eccv_map_at_r", "eccv_rprecision"]
    figures = {name: {"text_to_image": 0.1, "image_to_text": 0.3} for name in names}
    return {"coco": figures | {"coco_1k_rsum": 400.0, "coco_5k_rsum": 300.0}}


@pytest.fixture
def karpathy(tmp_path, monkeypatch):
    """Results on a data set and backbone with published figures."""
    monkeypatch.setitem(globals(), "BACKBONE", "ViT-B-32-quickgelu")
    monkeypatch.setitem(globals(), "DATA", "coco-karpathy")
    write(tmp_path, "clip", 0, 0.304, **coco_figures())
    variants = ("pcmepp+official", "pfe+official", "probvlm+official", "probvlm", "probvlm+official+infonce", "prolip")
    for variant in variants:
        write(tmp_path, variant, 0, 0.3, -0.5, **coco_figures())
    write(tmp_path, "probvlm+official", 1, 0.3, -0.5, **coco_figures())
    return tmp_path


def test_published_figures_stand_beside_measured_ones(karpathy):
    (block,) = blocks_of(karpathy)
    recall, uncertainty = (tables_of(block)[name] for name in ("recall", "uncertainty"))
    heads = [name for name, _ in tables.spans([column.group for column in recall.columns if column.published])]
    assert heads == [
        f"published ({source}), {side}, %" for source in ("open_clip", "GroVE") for side in ("text→image", "image→text")
    ]
    assert mean(recall, "clip", "published_open_clip_text_to_image_r1") == 30.44
    assert mean(recall, "clip", "published_open_clip_image_to_text_r10") == 83.52
    assert mean(recall, "pfe+official", "published_open_clip_text_to_image_r1") is None
    assert mean(recall, "pfe+official", "published_grove_text_to_image_r1") == 21.9

    # Papers differ on the same method, backbone and data set.
    key = "image_to_text_minus_s_r2"
    assert mean(uncertainty, "probvlm+official", f"published_probvlm_{key}") == 0.93
    assert mean(uncertainty, "probvlm+official", f"published_grove_{key}") == 0.14
    assert mean(uncertainty, "probvlm", f"published_grove_{key}") is None  # the paper computes otherwise
    assert mean(uncertainty, "clip, top score", f"published_grove_{key}") == 0.51
    others = ("clip, entropy", "prolip", "probvlm+official+infonce")  # no paper trains ProbVLM by the unified objective
    assert [mean(uncertainty, row, f"published_grove_{key}") for row in others] == [None] * 3
    cells = [cell for row in rows_of(uncertainty).values() for key, cell in row.cells.items() if "published" in key]
    assert cells and not any(cell.best or cell.sd is not None for cell in cells)

    report.write_tables(karpathy / "shapes", blocks_of(karpathy))
    text = text_of(karpathy, "table.md")
    assert (
        "S, published (GroVE, 5 levels), text→image" in text and "\n- published (GroVE): ranked by Wasserstein" in text
    )
    assert "{published (ProbVLM, 5 levels), image$\\rightarrow$text}" in text_of(karpathy, "table.tex")
    assert csv_of(karpathy)["uncertainty", "pfe+official", "published_probvlm_text_to_image_s"]["published"] == "1"


def test_eccv_averages_both_directions(karpathy):
    table = table_of(karpathy, "eccv")
    keys = ("eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_r1", "coco_5k_r1", "coco_1k_r1")
    assert [mean(table, "clip", key) for key in keys] == pytest.approx([20] * 6)
    assert [mean(table, "clip", key) for key in ("coco_5k_rsum", "coco_1k_rsum")] == [300, 400]
    printed = {key: mean(table, "pcmepp+official", f"published_pcme___{key}") for key in (*keys[:5], "coco_1k_rsum")}
    assert list(printed.values()) == [40.1, 49.7, 83.1, 56.8, 55.1, 537.0]
    assert mean(table, "clip", "published_eccv_caption_eccv_map_at_r") == 26.75
    assert mean(table, "probvlm", "published_pcme___eccv_r1") is None


def test_coco_1k_alone(tmp_path):
    figures = {name: value for name, value in coco_figures()["coco"].items() if name.startswith("coco_1k")}
    write(tmp_path, "clip", 0, 0.3, coco=figures)
    assert [column.key for column in table_of(tmp_path, "eccv").columns] == ["coco_1k_r1", "coco_1k_rsum"]


def test_nothing_published_no_column(folder, block):
    assert not any(column.published for table in block.tables for column in table.columns)
    assert "published" not in text_of(folder, "table.md") and "eccv" not in tables_of(block)


def entries(table):
    return [pytest.param(entry, id=f"{entry['source']}-{entry['data']}-{entry['backbones'][0]}")
            for entry in published.entries() if entry["table"] == table]  # fmt: skip


def test_published_figures_name_existing_tables_columns_and_backbones():
    keys = {table.name: {column.key for column in (*table.columns, *table.hidden)} for table in every_table()}
    for entry in published.entries():
        trend = {"levels"} if entry["table"] == "uncertainty" else set()
        assert set(entry) == {"source", "note", "table", "data", "backbones", "columns", "rows"} | trend
        assert set(entry["columns"]) <= keys[entry["table"]]
        assert all(len(row) == len(entry["columns"]) for row in entry["rows"].values())
        assert all((HOME / "configs" / "backbones" / f"{name}.yaml").is_file() for name in entry["backbones"])
    text = published.FILE.read_text(encoding="utf-8")
    assert yaml.safe_load(text) == published.entries() and text.isascii() is ("²" not in text)


def every_table():
    """All tables of results with every optional entry."""
    for task in TASKS:
        coco = {**coco_figures(), "hierarchy": chains(falling_steps=0.9), **both_scores("similarity", 0.2)}
        more = coco if task == "retrieval" else {}
        result = make_result("pfe", 0, 0.3, -0.5, task=task, truth=True, **more)
        yield from evaluations.Evaluation(task, DATA, BACKBONE, {"pfe": [Result(report.Path("a/b/c"), result)]}).tables


MISPRINTED = {("ProbVLM", "coco-karpathy", "ttda", "text_to_image")}  # 0.00, although 0.10 * 0.26 is 0.03
# Tolerance beyond rounding: over several runs, the mean of a product is not the product of the means.
SLACK = {"ProbVLM": 0.0, "GroVE": 0.03}


@pytest.mark.parametrize("entry", entries("uncertainty"))
def test_published_trends_agree_with_themselves(entry):
    for method, values in entry["rows"].items():
        printed = dict(zip(entry["columns"], values, strict=True))
        for side in RETRIEVAL:
            if f"{side}_s" in printed:
                s, r2, both = (printed[f"{side}_{key}"] for key in ("s", "r2", "minus_s_r2"))
                near = abs(-s * r2 - both) <= 0.01 * (1 + abs(s) + abs(r2)) + SLACK[entry["source"]]
                assert near != ((entry["source"], entry["data"], method, side) in MISPRINTED), method


@pytest.mark.parametrize("entry", entries("recall"))
def test_published_recall_rises_with_k(entry):
    for values in entry["rows"].values():
        printed = dict(zip(entry["columns"], values, strict=True))
        for side in RETRIEVAL:
            recalls = [printed[f"{side}_r{k}"] for k in (1, 5, 10) if f"{side}_r{k}" in printed]
            assert recalls == sorted(recalls) and recalls[0] > 0 and recalls[-1] <= 100


def test_zero_shot_figures_of_two_sources_agree():
    """COCO 5K R@1 of CLIP ViT-B/32: the mean of open_clip's two directions is the R@1 of PCME++ and ECCV Caption."""
    sources = {
        entry["source"]: dict(zip(entry["columns"], entry["rows"]["clip"], strict=True))
        for entry in published.entries()
        if (entry["data"], entry["backbones"]) == ("coco-karpathy", ["ViT-B-32-quickgelu"]) and "clip" in entry["rows"]
    }
    mean_r1 = (sources["open_clip"]["text_to_image_r1"] + sources["open_clip"]["image_to_text_r1"]) / 2
    assert mean_r1 == pytest.approx(sources["ECCV Caption"]["coco_5k_r1"], abs=0.01)
    for key in ("eccv_map_at_r", "eccv_rprecision", "cxc_r1", "coco_5k_r1"):
        assert sources["PCME++"][key] == pytest.approx(sources["ECCV Caption"][key], abs=0.051)


def test_classification(tmp_path):
    result = make_result("clip", 0, 0.6, task="classification", truth=True)
    result["image_to_class"]["interval"] = {"recall": {"1": [0.5, 0.7]}}
    save(tmp_path, result)
    for seed, recall in enumerate((0.6, 0.7)):
        write(tmp_path, "pfe", seed, recall, -0.5, task="classification", truth=True)
    table = table_of(tmp_path, "classification")
    methods, stand_ins = ["clip", "clip + temperature", "pfe", "pfe + temperature"], list(rows_of(table))[2:-2]
    assert list(rows_of(table)) == [*methods[:2], *stand_ins, *methods[2:]]
    # Each uncertainty that costs nothing stands beside the learned one, in the same columns; it has no others.
    assert {"clip, entropy", "clip, top probability", "clip, margin"} <= set(stand_ins)
    assert all(rows_of(table)[row].cells.keys() == {"query_auroc"} for row in stand_ins)
    assert mean(table, "clip, entropy", "query_auroc") == mean(table, "clip", "entropy_auroc") is not None
    intervals = [rows_of(table)["clip"].cells[f"{name}_interval"].text for name in ("acc", "entropy_auroc")]
    assert intervals == ["[50.0, 70.0]", "[-1.000, 1.000]"]
    titles = [column.title for column in table.columns]
    assert titles[:6] == ["ACC, %", "ACC, interval", "top-5, %", "NLPD", "ECE", "ECE, 20 bins"]
    cell = rows_of(table)["pfe"].cells["acc"]
    assert cell.mean == pytest.approx(65) and cell.sd == pytest.approx(50**0.5)
    assert [mean(table, row, "nll") for row in methods] == [2, 1, 2, 1]
    assert [mean(table, row, "query_auroc") for row in methods] == [None, None, 0.625, None]
    assert [mean(table, row, "query_spearman") for row in methods] == [None, None, 0.75, None]
    assert rows_of(table)["clip + temperature"].cells["ece_15"].best
    assert mean(table_of(tmp_path, "selective"), "pfe", "image_to_class_query_aurc") == 0.25


def test_without_temperature_or_human_labels_there_are_no_such_figures(tmp_path):
    result = make_result("pfe", 0, 0.6, -0.5, task="classification")
    del result["image_to_class"]["calibration"]["temperature"]
    save(tmp_path, result)
    table = table_of(tmp_path, "classification")
    assert list(rows_of(table)) == ["pfe"] and not any("spearman" in column.key for column in table.columns)


def test_calibration(tmp_path):
    write(tmp_path, "clip", 0, 0.3)
    table = table_of(tmp_path, "calibration")
    heads = [name for name, _ in tables.spans([column.group for column in table.columns])]
    assert heads == ["as the method gives it", "temperature-scaled"]
    keys = ["ece_15", "ece_20", "adaptive_ece", "nll", "brier"]
    assert [column.key for column in table.columns[:5]] == [f"text_to_image_{key}" for key in keys]
    assert [mean(table, "clip", f"text_to_image_{key}") for key in keys] == [ERRORS[key] for key in keys]
    assert mean(table, "clip", "image_to_text_ece_15_scaled") == 0.1


def test_hierarchy_lists_each_training_free_baseline_once(tmp_path):
    write(tmp_path, "clip", 0, task="hierarchy")
    for seed, steps in enumerate((0.9, 0.7)):
        write(tmp_path, "pfe", seed, s=-steps, task="hierarchy")
    table = table_of(tmp_path, "hierarchy")
    assert list(rows_of(table)) == ["clip", "pfe", "long embedding", "few words"]
    assert [mean(table, row, "falling_steps") for row in rows_of(table)] == pytest.approx([None, 80, 80, 100])
    assert [mean(table, "pfe", column.key) for column in table.columns] == pytest.approx([80, 50, -0.5, -0.75])
    assert rows_of(table)["few words"].folder is None and "40 prompts in 10 chains" in table.note
    report.write_tables(tmp_path / "shapes", blocks_of(tmp_path))
    assert "| *few words* |  | 100.0 | 50.0 |" in text_of(tmp_path, "table.md")


def test_chains_of_a_retrieval_have_a_separate_table(tmp_path):
    write(tmp_path, "pfe", 0, 0.2, -0.5, hierarchy=chains(falling_steps=0.9))
    names = [table.name for table in blocks_of(tmp_path)[0].tables]
    assert names == ["recall", "uncertainty", "levels", "selective", "calibration", "hierarchy"]


def test_rows_of_the_unified_objective_form_a_group_below(tmp_path):
    native, unified = ["clip", "pfe", "prolip"], ["pfe+infonce", "prolip+infonce"]
    for i, variant in enumerate((*native, *unified)):
        write(tmp_path, variant, 0, 0.3 + i / 100, -0.5, truth=True)
    (block,) = blocks_of(tmp_path)
    recall = tables_of(block)["recall"]
    assert [(title, [row.name for row in rows]) for title, rows in recall.groups] == [
        ("", native),
        (columns.UNIFIED, unified),
        ("", ["Bayes-optimal"]),
    ]
    # The best value is over both groups.
    assert [row.name for row in rows_of(recall).values() if row.cells["text_to_image_r1"].best] == [unified[-1]]

    report.write_tables(tmp_path / "shapes", blocks_of(tmp_path))
    markdown = markdown_tables(tmp_path)
    assert len(markdown) == len(block.tables)
    for lines in markdown:
        heading = lines.index(next(line for line in lines if line.startswith(f"| *{columns.UNIFIED}* |")))
        assert "[prolip" in lines[heading - 1] and "[pfe+infonce](" in lines[heading + 1]

    printed = formats.to_text([block]).splitlines()
    above = [i for i, line in enumerate(printed) if line == f"{columns.UNIFIED}:"]
    assert len(above) >= len(markdown) - len(formats.LONG)
    assert all(printed[i + 1].startswith("pfe+infonce ") for i in above)

    for table in text_of(tmp_path, "table.tex").split(r"\begin{tabular}")[1:]:
        lines = table.splitlines()
        heading = next(i for i, line in enumerate(lines) if columns.UNIFIED in line)
        assert lines[heading - 1] == r"\midrule" and lines[heading - 2].startswith("prolip")
        assert lines[heading].endswith(rf"{{\emph{{{columns.UNIFIED}}}}} \\")
        assert lines[heading + 1].startswith("pfe+infonce &")


@pytest.mark.parametrize("variants", [("clip", "pfe"), ("clip+infonce", "pfe+infonce")])
def test_one_objective_alone_needs_no_heading(tmp_path, variants):
    for variant in variants:
        write(tmp_path, variant, 0, 0.3, -0.5)
    report.write_tables(tmp_path / "shapes", blocks_of(tmp_path))
    assert [title for title, _ in table_of(tmp_path, "recall").groups] == [""]
    assert not any(columns.UNIFIED in text_of(tmp_path, name) for name in ("table.md", "table.tex"))


def test_rows_name_the_number_of_images_seen_in_training(tmp_path):
    write(tmp_path, "pfe", 0, 0.3, -0.5, seen_in_training=1200)
    assert list(rows_of(table_of(tmp_path, "recall"))) == ["pfe (trained on 1,200 of the images)"]


def test_the_same_bytes_each_time(folder, capsys):
    def files():
        return {path.name: path.read_bytes() for path in (folder / "shapes").iterdir() if path.is_file()}

    before = files()
    report.main(["--dataset", "shapes", "--results", str(folder)])
    assert {"table.md", "table.tex", "table.csv", "report.html"} < set(before) and files() == before
    assert capsys.readouterr().out.endswith(f"\n\n{folder / 'shapes' / 'report.html'}\n")


def test_without_ground_truth_there_are_no_limits(tmp_path):
    write(tmp_path, "pfe", 0, 0.3, -0.5)
    write(tmp_path, "clip", 0, 0.3)
    report.write_tables(tmp_path / "shapes", blocks_of(tmp_path))
    for name in ("table.md", "table.tex", "table.csv"):
        assert "Bayes" not in text_of(tmp_path, name) and "limit" not in text_of(tmp_path, name)
    assert "truth" not in {table.name for table in blocks_of(tmp_path)[0].tables}


def test_each_data_set_backbone_and_task_has_a_block(tmp_path):
    others = (("coco", "tiny", 4), ("shapes", "tiny", 4), ("shapes", "large", 5))
    for evaluated_on, backbone, levels in others:
        result = make_result("clip", 0, 0.3, evaluated_on=evaluated_on, levels=levels)
        result["config"]["backbone"] = backbone
        save(tmp_path, result)
    write(tmp_path, "clip", 0, 0.5, task="classification", evaluated_on="cifar10")
    write(tmp_path, "clip", 0, task="hierarchy")
    blocks = blocks_of(tmp_path)
    # The data set trained on comes first.
    assert [block.title for block in blocks] == [
        "shapes, large: retrieval", "shapes, tiny: retrieval", "shapes, tiny: hierarchy",
        "cifar10, tiny: classification", "coco, tiny: retrieval",
    ]  # fmt: skip
    assert [block.title for block in evaluations.read(tmp_path / "shapes", "large")] == ["shapes, large: retrieval"]
    assert report.suffixes(blocks) == [
        "-shapes-large", "-shapes-tiny-retrieval", "-shapes-tiny-hierarchy", "-cifar10-tiny", "-coco-tiny"
    ]  # fmt: skip
    assert report.suffixes(blocks[:1]) == [""]


def test_an_error_without_results_names_the_command_and_the_available_results(tmp_path, capsys):
    message = fails(tmp_path, capsys)
    command = "run `python eval.py --dataset shapes --method METHOD` or, for classes, active_learning.py first"
    assert command in message and "nor of any other" in message
    write(tmp_path, "clip", 0, 0.3)
    assert "of backbone 'huge', but of tiny" in fails(tmp_path, capsys, "--backbone", "huge")
    (tmp_path / "empty").mkdir()
    for unknown in ("shpaes", "empty", ".", "..", "", "shapes/tiny", str(tmp_path)):
        assert "but of shapes: name one that is" in fails(tmp_path, capsys, dataset=unknown)
    assert "but of shapes: run `python eval.py --dataset coco " in fails(tmp_path, capsys, dataset="coco")


def spoiled():
    """Contents that eval.py does not write: of another program, truncated, or edited by hand."""
    yield from (
        "",
        "{",
        "[]",
        "{}",
        '{"config": 3}',
        "[" * 100_000,
        '{"task": "retrieval"}',
        '{"a": NaN}',
        "null",
        "\0",
    )
    for path, value in (
        (("images",), "many"),
        (("task",), "dancing"),
        (("config", "seed"), "zero"),
        (("config", "train"), None),
        (("text_to_image",), []),
        (("text_to_image", "recall", "1"), "high"),
        (("text_to_image", "levels_by"), ["query"]),
        (("image_to_text", "uncertainty"), {"entropy": 3}),
        (("text_to_image", "uncertainty", "entropy", "levels"), {"count": 4}),
        (("text_to_image", "uncertainty", "query", "levels", "recall", "1"), [0.5]),
        (("text_to_image", "calibration", "model"), None),
        (("text_to_image", "examples", "most_certain"), [{"query": 3}]),
        (("coco",), {"eccv_r1": []}),
        (("hierarchy",), [1]),
        (("evaluated_on",), "../x"),
        (("config", "backbone"), "../../x"),
    ):
        yield json.dumps(put(make_result("pfe", 0, 0.3, -0.5), path, value))


@pytest.mark.parametrize("damage", [*spoiled()], ids=lambda text: None)
def test_damaged_or_foreign_result_is_named(tmp_path, capsys, damage):
    path = write(tmp_path, "clip", 0, 0.3)
    path.write_text(damage)
    assert f"{path} is damaged or not a result of eval.py" in fails(tmp_path, capsys)


def test_a_result_under_the_file_name_of_another_task_is_named(tmp_path, capsys):
    path = write(tmp_path, "clip", 0, 0.3)
    other = path.rename(path.with_name("shapes-classification.json"))
    assert f"{other} is damaged or not" in fails(tmp_path, capsys)


def test_a_result_of_an_earlier_format_is_refused(tmp_path, capsys):
    path = write(tmp_path, "clip", 0, 0.3)
    old = {"variant": "clip", "evaluated_on": "shapes", "config": {}, "text_to_image": {"recall": {"1": 0.3}}}
    path.write_text(json.dumps(old))
    message = fails(tmp_path, capsys)
    assert str(path) in message and "earlier" in message and "evaluate again" in message


@pytest.mark.parametrize(
    "changes", [{"levels": 5}, {"fingerprint": "g"}, {"drop_remainder": True}, {"levels_by": "sum"}]
)
def test_results_that_do_not_fit_one_table_are_named(tmp_path, capsys, changes):
    paths = [write(tmp_path, "pcmepp", 0, 0.3, -0.5), write(tmp_path, "pfe", 0, 0.3, -0.5, **changes)]
    message = fails(tmp_path, capsys)
    assert all(str(path) in message for path in paths) and "different" in message


def test_levels_by_need_not_agree_without_an_uncertainty(tmp_path):
    write(tmp_path, "clip", 0, 0.3)
    write(tmp_path, "pfe", 0, 0.3, -0.5, levels_by="sum")
    assert len(blocks_of(tmp_path)) == 1


def test_seeds_of_one_variant_differ_in_the_seed_alone(tmp_path, capsys):
    first, second = write(tmp_path, "clip", 0, 0.3), write(tmp_path, "clip", 1, 0.3)
    result = json.loads(second.read_text())
    for change, reason in (({"seed": 0}, "the same seed"), ({"train": {"batch_size": 8, "epochs": 3}}, "train.epochs")):
        second.write_text(json.dumps(result | {"config": result["config"] | change}))
        message = fails(tmp_path, capsys)
        assert reason in message and str(first) in message and str(second) in message


@pytest.mark.parametrize("damage", [b"", b"PK", None])
def test_damaged_arrays_are_named(tmp_path, damage):
    path = write(tmp_path, "pfe", 0, 0.3, -0.5).with_suffix(".npz")
    path.write_bytes(damage) if damage is not None else path.unlink()
    (run,) = blocks_of(tmp_path)[0].results["pfe"]
    with pytest.raises(UserError, match=f"{path.name} is missing or damaged"):
        _ = run.arrays


def test_arrays_without_an_expected_entry_are_named(tmp_path):
    path = write(tmp_path, "pfe", 0, 0.3, -0.5).with_suffix(".npz")
    np.savez_compressed(path, weight=np.zeros(3))
    (run,) = blocks_of(tmp_path)[0].results["pfe"]
    assert "text_to_image_hit" not in run.arrays
    with pytest.raises(UserError, match=f"{path.name} holds no 'text_to_image_hit'"):
        _ = run.arrays["text_to_image_hit"]


def test_the_uncertainty_of_an_untrained_start_is_left_out(tmp_path):
    """Of tables, chains of prompts and findings: it is of random weights."""
    write(tmp_path, "clip", 0, 0.3, truth=True)
    write(tmp_path, "pfe", 0, 0.3, -0.5, truth=True)
    write(tmp_path, "prolip", 0, 0.3, -0.5, truth=True, untrained=True, hierarchy=chains(spearman_depth=-1.0))
    (part,) = blocks_of(tmp_path)
    side = part.results["prolip"][0].values["text_to_image"]
    assert side["levels_by"] is None and not {"query", "retrieved", "sum"} & side["uncertainty"].keys()
    assert "prolip (untrained start)" in rows_of(tables_of(part)["recall"])
    for name in ("uncertainty", "selective", "truth", "hierarchy"):
        table = tables_of(part).get(name)
        rows = (
            {} if table is None else {row: cells for row, cells in rows_of(table).items() if row.startswith("prolip")}
        )
        assert not any("query" in key and key.startswith("text") for row in rows.values() for key in row.cells), name
    assert any("held-out pairs chose the start" in warning for warning in part.warnings)
    write(tmp_path, "linear", 0, 0.3, start_kept=True)  # without an uncertainty that training could spoil
    (part,) = blocks_of(tmp_path)
    assert "linear (untrained start)" in rows_of(tables_of(part)["recall"])
    assert "linear: held-out pairs chose the start, so its answers are those before training." in part.warnings
    write(tmp_path, "asymvlm", 0, 0.3, -0.5, truth=True, untrained=True)
    (part,) = blocks_of(tmp_path)
    assert baseline_of(part) == "clip"  # not the first that shows no uncertainty


def test_what_macos_puts_beside_results_is_none(tmp_path):
    for name in ("a-retrieval.json", "._a-retrieval.json"):
        (tmp_path / name).touch()
    assert [path.name for path in evaluations.paths(tmp_path)] == ["a-retrieval.json"]
