"""Reports of results of active_learning.py and factor_trace.py: numbers against independent computation."""

import csv
import io
import itertools
import json
import shutil

import numpy as np
import pytest
from conftest import put
from scipy import stats
from studies import BUDGETS, FIGURES, SETTINGS, make_result, write_result, write_study, write_trace

import report
from labeling.strategies import STRATEGIES
from metrics import calibration
from reporting import studies as study_results
from reporting import traces
from reporting.curves import ORDER, WEIGHTED
from reporting.figures import studies as figures
from reporting.figures import style
from reporting.rendering import NARROW
from reporting.tables import formats
from reporting.words import NONE

SCALE = {"accuracy": 100, "nll": 1, "ece": 100}
DIGITS = {"accuracy": 1, "nll": 3, "ece": 1}
NAMES = [*map(str, BUDGETS), "mean"]


def run(folder, capsys, *flags, dataset="shapes"):
    report.main(["--dataset", dataset, "--results", str(folder), *flags])
    return capsys.readouterr().out


def fails(folder, capsys, *flags, **options):
    with pytest.raises(SystemExit) as error:
        run(folder, capsys, *flags, **options)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    return message


def study_of(folder, **options):
    write_study(folder, **options)
    [study] = study_results.read(folder / "shapes")
    return study


def values_of(strategy, seeds, figure):
    """Expected figures (S, budgets and their mean), in printed units, from the numbers of the files."""
    by_budget = [[point[figure] for point in make_result(strategy, seed)["curve"]] for seed in seeds]
    return SCALE[figure] * np.array([[*row, sum(row) / len(row)] for row in by_budget])


def rows_of(table):
    return {row.name: row for _, rows in table.groups for row in rows}


@pytest.mark.parametrize("figure", FIGURES)
def test_means_and_deviations_over_seeds(tmp_path, figure):
    study = study_of(tmp_path)
    rows = rows_of(study.tables[FIGURES.index(figure)])
    assert list(rows) == ["random", "entropy", "bald", "no label"]
    for strategy in ("random", "entropy", "bald"):
        values = values_of(strategy, range(3), figure)
        for name, column in zip(NAMES, values.T, strict=True):
            cell = rows[strategy].cells[f"{figure}_{name}"]
            assert (cell.mean, cell.sd) == pytest.approx((column.mean(), column.std(ddof=1)))
            best = {"accuracy": max}.get(figure, min)
            means = [rows[other].cells[f"{figure}_{name}"].mean for other in ("random", "entropy", "bald")]
            assert cell.best == (round(cell.mean, DIGITS[figure]) == round(best(means), DIGITS[figure]))
    before = SCALE[figure] * make_result("random", 0)["before"][figure]
    assert [cell.mean for cell in rows["no label"].cells.values()] == pytest.approx([before] * len(NAMES))
    assert rows["no label"].folder is None


def adjusted(p):
    """Adjust p-values by Holm's procedure, one hypothesis after the other."""
    by_index, least = {}, 0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, (len(p) - rank) * p[i])
        by_index[i] = min(1, least)
    return [by_index[i] for i in range(len(p))]


@pytest.mark.parametrize("figure", FIGURES)
def test_differences_from_random_are_paired_by_seed(tmp_path, figure):
    seeds = range(5)
    study, others = study_of(tmp_path, seeds=seeds), ("entropy", "bald")
    rows = rows_of(study.tables[FIGURES.index(figure)])
    base = values_of("random", seeds, figure)
    tests = [stats.ttest_rel(values_of(name, seeds, figure), base) for name in others]
    single = adjusted([p for test in tests for p in test.pvalue[:-1]])
    means = adjusted([test.pvalue[-1] for test in tests])
    for i, (name, test) in enumerate(zip(others, tests, strict=True)):
        interval = test.confidence_interval(0.95)
        for j, column in enumerate(NAMES):
            cells, key = rows[name].cells, f"{figure}_{column}_gap"
            low, high, p = interval.low[j], interval.high[j], [*single[3 * i : 3 * i + 3], means[i]][j]
            reported = [cells[f"{key}_{end}"].mean for end in ("low", "high", "adjusted_p")]
            assert reported == pytest.approx([low, high, p])
            mark = "‡" if p < 0.05 else "†" if low > 0 or high < 0 else ""
            digits = DIGITS[figure]
            text = f"{(low + high) / 2:+.{digits}f} ± {(high - low) / 2:.{digits}f}".replace("-", "\N{MINUS SIGN}")
            assert cells[key].text == text + mark and cells[key].mean == pytest.approx((low + high) / 2)
    assert not any("gap" in key for key in rows["random"].cells)


def test_marks_separate_a_single_comparison_from_all(tmp_path):
    gaps = {"random": [0, 0, 0, 0], "entropy": [-0.5, -0.505, -0.51, -0.495], "bald": [-0.2, -0.8, -0.5, -0.3]}
    for strategy, row in gaps.items():
        for seed, gap in enumerate(row):
            curve = [point | {"nll": 1 + 0.1 * seed + gap} for point in make_result(strategy, seed)["curve"]]
            write_result(tmp_path, strategy, seed, curve=curve)
    [study] = study_results.read(tmp_path / "shapes")
    rows = rows_of(study.tables[1])
    p = stats.ttest_1samp(gaps["bald"], 0).pvalue
    assert 0.02 < p < 0.05
    # By mean it has the larger p of two comparisons; by budget, three of six have a smaller p.
    for column, adjusted, mark in (("10", 3 * p, "†"), ("mean", p, "‡")):
        cells = rows["bald"].cells
        assert cells[f"nll_{column}_gap_adjusted_p"].mean == pytest.approx(adjusted)
        assert cells[f"nll_{column}_gap"].text[-1] == mark
    assert rows["entropy"].cells["nll_10_gap"].text[-1] == "‡"


def test_only_shared_seeds_are_compared(tmp_path):
    write_study(tmp_path, ["random"], seeds=(0, 1, 2))
    write_study(tmp_path, ["entropy"], seeds=(1, 2, 3))
    write_study(tmp_path, ["bald"], seeds=(2, 7))
    [study] = study_results.read(tmp_path / "shapes")
    rows = rows_of(study.tables[0])
    gap = values_of("entropy", (1, 2), "accuracy") - values_of("random", (1, 2), "accuracy")
    assert rows["entropy"].cells["accuracy_mean_gap"].mean == pytest.approx(gap.mean(axis=0)[-1])
    assert "accuracy_10_gap" not in rows["bald"].cells and rows["bald"].cells["accuracy_10"].sd is not None
    assert [rows[name].seeds for name in ("random", "entropy", "bald")] == [3, 3, 2]
    assert study.summary == "mean ± s.d. over 2 to 3 seeds"


@pytest.mark.parametrize("options", [{"seeds": (4,)}, {"strategies": ("entropy", "bald")}])
def test_without_random_or_with_one_seed_nothing_is_compared(tmp_path, options):
    study = study_of(tmp_path, **options)
    for table in study.tables:
        assert {column.group for column in table.columns} == {table.columns[0].group}
        assert "†" not in table.note and "less random" not in table.note.lower()
    if options.get("seeds"):
        assert study.summary == "one seed" and "±" not in formats.to_text([study])


@pytest.mark.parametrize(
    ("settings", "validation"),
    [
        ({}, "500 of shifted-val, free"),
        ({"val_counts": 0.2}, "20 % of every budget, of shifted-val"),
        ({"val": None}, "none: training ends with its last epoch"),
    ],
)
def test_facts_name_validation_pool_and_target(tmp_path, settings, validation):
    study = study_of(tmp_path, settings=SETTINGS | settings)
    assert study.facts["labels that pick the epoch"] == validation
    assert study.facts["pool of each seed"] == "2,000 images of train and shifted-train"
    assert study.facts["target"] == "shifted-test: 1,000 images of 8 classes"


def test_every_format_holds_the_tables(tmp_path, capsys, blank_figures):
    write_study(tmp_path, seeds=range(5))
    write_study(tmp_path, name="shifted-test+other", settings=SETTINGS | {"lr": 0.1})
    write_trace(tmp_path)
    out, folder = run(tmp_path, capsys), tmp_path / "shapes"
    text = (folder / "table.md").read_text(encoding="utf-8")
    values = values_of("bald", range(5), "nll")[:, -1]
    assert (
        f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" in text.replace("**", "") and "| strategy | seeds |" in text
    )
    assert (
        "[bald](<tiny/active/shifted-test>)" in text and "| batches | trials |" in text and "shifted-test+other" in text
    )
    assert "[nll] NLL by number of labels" in out and "*" not in out.split("[factor_trace]")[1]  # no trace is the best
    latex = (folder / "table.tex").read_text(encoding="utf-8")
    assert "strategy & " in latex and "†" not in latex and "‡" not in latex
    lines = [*csv.DictReader(io.StringIO((folder / "table.csv").read_text(encoding="utf-8")))]
    keys = [(line["evaluated_on"], line["task"], line["table"], line["row"], line["column"]) for line in lines]
    assert len(keys) == len(set(keys))
    line = lines[keys.index(("shifted-test", "active", "nll", "bald", "nll_mean"))]
    assert (float(line["mean"]), float(line["sd"])) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)))
    assert ("shifted-test+other", "active", "nll", "bald", "nll_10_gap_low") in keys
    drawn = {path.name for path in folder.glob("*.p[nd][gf]")}
    for kind in ("png", "pdf"):
        assert {f"learning_curves-shifted-test-tiny.{kind}", f"error_by_entropy-shifted-test+other-tiny.{kind}"} < drawn
        assert f"factor_trace.{kind}" in drawn
    shutil.rmtree(folder / "tiny" / "active" / "shifted-test+other")
    run(tmp_path, capsys)  # removes figures under the earlier names
    assert {path.name for path in folder.glob("*.png")} == {
        "learning_curves.png", "error_by_entropy.png", "factor_trace.png"
    }  # fmt: skip


def test_the_same_bytes_each_time(tmp_path, capsys):
    write_study(tmp_path)
    write_trace(tmp_path)
    folder = tmp_path / "shapes"
    files = []
    for _ in range(2):
        run(tmp_path, capsys)
        files.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    assert files[0] == files[1] and len(files[0]) == 4 + 2 * 3


def test_backbone_filters_results_and_traces(tmp_path, capsys, one_figure):
    write_study(tmp_path)
    write_study(tmp_path, backbone="large")
    write_trace(tmp_path)
    write_trace(tmp_path, backbone="huge")
    printed = {name: run(tmp_path, capsys, "--backbone", name) for name in ("tiny", "large", "huge")}
    assert ["active learning" in out for out in printed.values()] == [True, True, False]
    assert ["[factor_trace]" in out for out in printed.values()] == [True, False, True]
    assert "shapes, tiny" not in printed["large"]
    assert "of backbone 'small', but of huge, large, tiny" in fails(tmp_path, capsys, "--backbone", "small")


def test_a_data_set_with_a_trace_or_a_study_alone_is_reported(tmp_path, capsys, one_figure):
    write_trace(tmp_path)
    write_study(tmp_path, dataset="shapes-colors")
    assert "but of shapes, shapes-colors: name one that is" in fails(tmp_path, capsys, dataset="shaeps")
    run(tmp_path, capsys)
    text = (tmp_path / "shapes" / "report.html").read_text(encoding="utf-8")
    assert "Adaptors trained" not in text and "checkpoints/" not in text


def spoiled_results():
    yield from ("", "{", "[]", "{}", "null", '{"a": NaN}', '{"settings": 3}')
    for path, value in (
        (("seed",), "zero"),
        (("images",), 999),
        (("settings",), None),
        (("settings", "budgets"), [10, 25]),
        (("settings", "pool"), "train"),
        (("curve",), []),
        (("curve",), {}),
        (("curve", 0, "nll"), "high"),
        (("curve", 2, "by_entropy", "error"), [0.5]),
        (("curve", 1, "by_entropy"), None),
        (("before", "accuracy"), None),
        (("before", "by_entropy", "count"), [1]),
        (("images",), None),
    ):
        yield json.dumps(put(make_result("entropy", 1), path, value))


@pytest.mark.parametrize("damage", [*spoiled_results()], ids=lambda text: None)
def test_a_damaged_result_is_named(tmp_path, capsys, damage):
    path = write_study(tmp_path) / "entropy-seed1.json"
    path.write_text(damage)
    assert f"{path} is damaged or not a result of active_learning.py: delete it" in fails(tmp_path, capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": SETTINGS | {"lr": 1.0}},
        {"settings": SETTINGS | {"val_counts": 0.2}},
        {"fingerprint": {"train": "g"}},
    ],
)
def test_results_of_other_settings_are_named(tmp_path, capsys, changes):
    folder = write_study(tmp_path)
    write_result(tmp_path, "bald", 1, **changes)
    message = fails(tmp_path, capsys)
    assert all(str(folder / f"bald-seed{seed}.json") in message for seed in (0, 1))
    assert {"settings": "settings.", "fingerprint": "fingerprint.train"}[next(iter(changes))] in message


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bald-seed3.json", {}),
        ("epig-seed1.json", {}),
        ("bald-seed1.json", {"dataset": "shapes-colors"}),
        ("bald-seed1.json", {"backbone": "large"}),
        ("bald-seed1.json", {"settings": SETTINGS | {"target": "test"}}),
    ],
)
def test_a_result_in_the_wrong_place_is_named(tmp_path, capsys, name, changes):
    path = write_study(tmp_path) / name
    path.write_text(json.dumps(make_result("bald", 1, **changes)))
    assert f"{path} holds bald-seed1 of" in fails(tmp_path, capsys)


def test_traces_are_means_over_trials(tmp_path, capsys, one_figure):
    path = write_trace(tmp_path)
    out = run(tmp_path, capsys)
    [trace] = traces.read(tmp_path / "shapes")
    rows = rows_of(trace.tables[0])
    assert list(rows) == ["1 batch", "2 batches", "3 batches"] and trace.summary == "mean ± s.d. over 5 trials"
    for side, points in json.loads(path.read_text())["sides"].items():
        for point in points:
            cell = rows[traces.batches(point["batches"])].cells[f"{side}_{point['candidates']}"]
            values = point["relative_trace"]
            assert (cell.mean, cell.sd) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
            assert f"{cell.mean:.3f} ± {cell.sd:.3f}" in out
    assert "K = 2,048 with 3 batches" in out


@pytest.mark.parametrize(
    "changes",
    [
        {"trials": 4},
        {"trials": 0},
        {"sides": {"image": []}},
        {"sides": {"image": [], "text": []}},
        {"sides": {side: [{"candidates": 8, "batches": 1, "relative_trace": 1}] for side in ("image", "text")}},
        {"sides": {side: [{"candidates": 0, "batches": 1, "relative_trace": [1] * 5}] for side in ("image", "text")}},
    ],
)
def test_damaged_traces_are_named(tmp_path, capsys, changes):
    path = write_trace(tmp_path, **changes)
    assert f"{path} is damaged or not a result of benchmarks.factor_trace" in fails(tmp_path, capsys)


def test_traces_in_the_wrong_place_are_named(tmp_path, capsys):
    path = write_trace(tmp_path)
    other = tmp_path / "coco" / "tiny"
    other.mkdir(parents=True)
    shutil.copy(path, other)
    assert f"{other / path.name} is of shapes, tiny" in fails(tmp_path, capsys, dataset="coco")


def band(axes, i):
    """The edges of band number i of a panel: {x: (lower, upper)}."""
    edge = axes.collections[i].get_paths()[0].vertices
    return {x: (edge[edge[:, 0] == x, 1].min(), edge[edge[:, 0] == x, 1].max()) for x in np.unique(edge[:, 0])}


def test_learning_curves_are_means_with_bands_of_deviations(tmp_path):
    study = study_of(tmp_path)
    for width in (style.WIDE, NARROW):
        figure = figures.learning_curves(study, {}, width)
        for axes, name in zip(figure.axes, FIGURES, strict=True):
            *lines, dashed = axes.lines
            assert [line.get_label() for line in lines] == ["random", "entropy", "bald"]
            for i, line in enumerate(lines):
                values = values_of(line.get_label(), range(3), name)[:, :-1]
                assert line.get_xdata() == pytest.approx(BUDGETS) and line.get_ydata() == pytest.approx(
                    values.mean(axis=0)
                )
                low, high = np.array(list(band(axes, i).values())).T
                spread = values.std(axis=0, ddof=1)
                assert (low, high) == (
                    pytest.approx(line.get_ydata() - spread),
                    pytest.approx(line.get_ydata() + spread),
                )
            assert dashed.get_ydata()[0] == pytest.approx(SCALE[name] * study.first["before"][name])


def test_each_strategy_has_the_same_distinct_style_in_every_figure(tmp_path):
    assert list(STRATEGIES) == list(ORDER)
    styles = figures._styles(study_of(tmp_path / "all", strategies=STRATEGIES))
    plain = {name: style for name, style in styles.items() if not name.endswith(WEIGHTED)}
    assert len({style["color"] for style in plain.values()}) == len({style["marker"] for style in plain.values()})
    assert len(plain) == len({style["color"] for style in plain.values()}) == len(STRATEGIES) - 3
    for name in styles.keys() - plain:
        assert styles[name]["color"] == styles[name.removesuffix(WEIGHTED)]["color"] and "linestyle" in styles[name]
    alone = figures.learning_curves(study_of(tmp_path, strategies=["bald"]), {})
    assert alone.axes[0].lines[0].get_color() == styles["bald"]["color"]


def test_error_over_entropy_before_and_after(tmp_path):
    write_study(tmp_path, ["random", "k-center"])
    write_result(tmp_path, "k-center", 5, curve=make_result("k-center", 5)["curve"][:2] + [undecided()])
    [study] = study_results.read(tmp_path / "shapes")
    first, last = figures.error_by_entropy(study, {}).axes
    before = make_result("random", 0)["before"]["by_entropy"]
    points = [make_result("random", seed)["curve"][-1]["by_entropy"] for seed in range(3)]
    dashed, line = first.lines
    assert dashed.get_xdata() == pytest.approx(before["entropy"])
    assert dashed.get_ydata() == pytest.approx(100 * np.array(before["error"]))
    assert line.get_xdata() == pytest.approx(np.mean([point["entropy"] for point in points], axis=0))
    errors = 100 * np.array([point["error"] for point in points])
    assert line.get_ydata() == pytest.approx(errors.mean(axis=0))
    edges = band(first, 0)
    for x, y, spread in zip(line.get_xdata(), errors.mean(axis=0), errors.std(axis=0, ddof=1), strict=True):
        assert edges[x] == pytest.approx((y - spread, y + spread))
    assert first.get_title() == "random\nAUROC 0.500 → 0.750"
    assert last.get_title() == f"k-center\nAUROC 0.500 → {NONE}"


def test_what_costs_nothing_stands_beside_the_strategies(tmp_path):
    """AUROCs of entropy and top probability with the most labels, and of plain CLIP without any."""
    study_of(tmp_path)
    for seed, auroc in enumerate((0.5, 0.7, 0.9)):
        path = tmp_path / f"shapes/tiny/active/shifted-test/bald-seed{seed}.json"
        result = json.loads(path.read_text())
        path.write_text(json.dumps(put(result, ("curve", -1, "probability_auroc"), auroc)))
    [study] = study_results.read(tmp_path / "shapes")
    table = study.tables[-1]
    assert table.title == "Which answers to trust, with 100 labels"
    cell = rows_of(table)["bald"].cells["probability_auroc"]
    assert (cell.mean, cell.sd) == (pytest.approx(0.7), pytest.approx(0.2))
    before = rows_of(table)["no label"].cells
    assert (before["entropy_auroc"].mean, before["probability_auroc"].mean) == (0.5, 0.6)
    for path in tmp_path.rglob("*-seed*.json"):  # of an earlier active_learning.py
        path.write_text(path.read_text().replace("probability_auroc", "other"))
    [study] = study_results.read(tmp_path / "shapes")
    assert [column.key for column in study.tables[-1].columns] == ["entropy_auroc"]


def undecided():
    """A point of the largest budget with no wrong prediction, so that AUROC is undefined."""
    return make_result("k-center", 5)["curve"][-1] | {"entropy_auroc": None}


def test_traces_are_drawn_side_by_side_with_deviations(tmp_path):
    path = write_trace(tmp_path)
    [trace] = traces.read(tmp_path / "shapes")
    figure = figures.factor_trace(trace, {})
    sides = json.loads(path.read_text())["sides"]
    for axes, side in zip(figure.axes, ("image", "text"), strict=True):
        assert axes.get_xscale() == "log" and axes.get_title() == f"{side} tower"
        for container, batches in zip(axes.containers, (1, 2, 3), strict=True):
            line, _, [bars] = container
            points = [point["relative_trace"] for point in sides[side] if point["batches"] == batches]
            assert line.get_ydata() == pytest.approx(np.mean(points, axis=1))
            lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
            assert lengths == pytest.approx(2 * np.std(points, axis=1, ddof=1))
            assert abs(np.log(line.get_xdata() / [128, 512, 2048])).max() < 0.5 * np.log(4) / 2  # nearest to its K


@pytest.mark.parametrize("width", [style.WIDE, NARROW])
@pytest.mark.parametrize(
    "options",
    [{"strategies": STRATEGIES}, {"strategies": ["epig"], "seeds": [0], "settings": SETTINGS | {"budgets": [7]}}],
)
def test_nothing_is_cut_off_and_colors_come_from_the_page(tmp_path, width, options):
    study = study_of(tmp_path, **options)
    write_trace(tmp_path)
    [trace] = traces.read(tmp_path / "shapes")
    for part in (study, trace):
        for drawing in style.drawings(part):
            figure = drawing.draw(part, {}, width)
            style.lay_out(figure)
            box = figure.get_tightbbox().extents
            whole = min(box[:2]) >= -0.02 and box[2] <= width + 0.02 and box[3] <= figure.get_figheight() + 0.02
            assert whole, drawing.name
            for axes in figure.axes:
                labels = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
                assert all(one.x1 < other.x0 for one, other in itertools.pairwise(labels))
            text = style.svg(figure, "name")
            assert not set(text.split("#")[1:]) & set(style.LIGHT["colors"]) and "var(--figure-ink)" in text
            assert not any(hue in text for theme in style.THEMES for hue in style.variables(theme).values())


def write_arrays(folder, images=200, budgets=3):
    """Write the arrays of every result of a study, random by strategy and seed; returns them by (seed, strategy)."""
    written = {}
    for path in sorted(folder.glob("*.json")):
        strategy, _, seed = path.stem.rpartition("-seed")
        rng = np.random.default_rng([*strategy.encode(), int(seed)])
        arrays = {name: rng.random((budgets, images)) for name in ("nll", "confidence")}
        arrays["hit"] = (rng.random((budgets, images)) < arrays["confidence"]).astype(float)
        np.savez(path.with_suffix(".npz"), **arrays)
        written[int(seed), strategy] = arrays
    return written


@pytest.mark.parametrize("figure", FIGURES)
def test_the_error_of_the_images_adds_to_that_of_the_seeds(tmp_path, figure):
    """The standard error over images by a bootstrap of whole images, the same for every seed and both strategies."""
    seeds, scale = range(4), SCALE[figure]
    folder = write_study(tmp_path, seeds=seeds)
    [alone] = study_results.read(tmp_path / "shapes")
    assert "sampling error of the seeds alone" in alone.tables[0].note
    arrays = write_arrays(folder)
    [study] = study_results.read(tmp_path / "shapes")
    assert "of the seeds and of the target's images" in study.tables[0].note
    rng, draws = np.random.default_rng(3), []

    def value(of, rows):
        if figure != "ece":
            return of[{"accuracy": "hit", "nll": "nll"}[figure]][:, rows].mean(axis=1)
        parts = [calibration.reliability(of["confidence"][k, rows], of["hit"][k, rows]) for k in range(3)]
        return np.array([calibration.calibration_error(part) for part in parts])

    for _ in range(400):
        rows = rng.integers(200, size=200)
        gap = np.mean(
            [value(arrays[seed, "bald"], rows) - value(arrays[seed, "random"], rows) for seed in seeds], axis=0
        )
        draws.append([*gap, gap.mean()])
    by_images = scale * np.std(draws, axis=0, ddof=1)
    gaps = values_of("bald", seeds, figure) - values_of("random", seeds, figure)
    by_seeds = gaps.std(axis=0, ddof=1) / len(seeds) ** 0.5
    half = stats.t.ppf(0.975, len(seeds) - 1) * np.hypot(by_seeds, by_images)
    row = rows_of(study.tables[FIGURES.index(figure)])["bald"]
    for name, expected, mean in zip(NAMES, half, gaps.mean(axis=0), strict=True):
        low, high = (row.cells[f"{figure}_{name}_gap_{end}"].mean for end in ("low", "high"))
        assert ((low + high) / 2, (high - low) / 2) == (pytest.approx(mean), pytest.approx(expected, rel=0.05))
