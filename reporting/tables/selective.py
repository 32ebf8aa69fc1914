"""Tables of an uncertainty's use: R@1 over its levels, and which answers to trust."""

from functools import partial

from reporting.runs import find, level_counts
from reporting.tables import Cell, Column, make, published
from reporting.tables.columns import (
    HIDDEN,
    SELECTIVE,
    TRENDS,
    bayes_optimal,
    constant,
    levels_by,
    named,
    own_or_deterministic,
    own_or_free,
    record,
    rows_of,
)
from reporting.words import CLASSIFICATION, FREE, GALLERY_AWARE, MINUS, RETRIEVAL, followed

COVERAGES = ("80", "90", "95")
RISK = "5"  # percent


def uncertainty(block):
    """Trend of R@1 over uncertainty levels, in the form of ProbVLM (arXiv 2307.00398), table 1."""
    columns = []
    for direction in ("image_to_text", "text_to_image"):  # in that paper's order
        group = RETRIEVAL[direction]
        columns.append(Column(f"{direction}_levels_by", group, "levels by", 0, partial(levels_by, direction), None))
        family = f"{direction}_family"
        columns.append(Column(family, group, "family", 0, partial(_family, direction), None, shown=False))
        for key, title, best, note in TRENDS:
            read = partial(record, direction, (key,))
            columns.append(Column(f"{direction}_{key}", group, title, 3, read, best, family, note))
        spread = partial(record, direction, ("spread",), scale=100)
        columns.append(Column(f"{direction}_spread", group, "spread, %", 1, spread, shown=False))
        for key in ("s", "r2", "minus_s_r2", "auroc"):
            for i, end in enumerate(("low", "high")):  # of the bootstrap over queries, averaged over seeds
                read = partial(record, direction, ("interval", key, i))
                columns.append(Column(f"{direction}_{key}_{end}", group, f"{key}, {end}", 3, read, None, shown=False))
    columns += published.columns(block, "uncertainty", columns, named)
    best = block.first.get("bayes_optimal") or {}
    limits = {f"text_to_image_{key}": Cell(best[key]) for key, *_ in TRENDS if best.get(key) is not None}
    note = (
        f"Over {block.first['uncer_levels']} levels of uncertainty, {_sizes(block)}. A query's own uncertainty is known"
        " before the search (query-only), the others after it (gallery-aware): the best of either kind is in bold."
    )
    if limits:
        note += (
            " Bayes-optimal: levels by true ambiguity. R@1 falls over them in a curve, so an imperfect order can have a"
            f" higher R² and {MINUS}S·R²."
        )
    rows = rows_of(block, columns, own_or_deterministic)
    if any(row.name.endswith(FREE["words"]) for _, group in rows for row in group):
        note += " Where counting words leads, a measure is no evidence for a method."
    note += constant(block, RETRIEVAL)
    return make("uncertainty", "R@1 and uncertainty", columns, rows, note, bayes_optimal(limits))


def levels(block):
    """R@1 by uncertainty level, as the public AsymVLM code prints it."""
    columns = []
    for direction, title in RETRIEVAL.items():
        group = f"{title}, R@1 in % by level"
        columns.append(Column(f"{direction}_levels_by", group, "levels by", 0, partial(levels_by, direction), None))
        for level in range(block.first["uncer_levels"]):
            read = partial(_level, direction, level)
            columns.append(Column(f"{direction}_level_{level + 1}", group, str(level + 1), 1, read, None))

    def rows(runs):
        for label, selector in own_or_deterministic(runs):
            yield label, selector
            if any("bayes_recall" in runs[0].values[direction] for direction in RETRIEVAL):
                yield f"{label}, limit", selector._replace(of_level="bayes_recall")

    best = enumerate(find(block.first, "bayes_optimal", "levels") or (), 1)
    limits = {f"text_to_image_level_{level}": Cell(100 * value) for level, value in best}
    note = f"Level 1 is the least uncertain; {_sizes(block)}."
    if limits:
        note += " Limit: Bayes-optimal R@1 of the same queries. Bayes-optimal: of levels by true ambiguity."
    note += constant(block, RETRIEVAL)
    title = "R@1 by uncertainty level"
    return make("levels", title, columns, rows_of(block, columns, rows), note, bayes_optimal(limits))


def selective(block):
    """Which answers to trust: by the query's own uncertainty, and by those that need scores over the gallery."""
    of_classes = block.directions == list(CLASSIFICATION)
    directions, right = (CLASSIFICATION, "ACC") if of_classes else (RETRIEVAL, "R@1")
    first, columns = next(iter(directions)), []
    for direction in directions:
        for name in ("query", "entropy", "top", "margin", "probability", "retrieved", "sum"):
            group = "query-only" if name == "query" else f"gallery-aware: {followed(direction, name)}"
            full = direction == first and name in ("query", "entropy")
            for key, title, best, note in SELECTIVE:
                read, full_key = partial(_of, name, direction, (key,)), f"{direction}_{name}_{key}"
                if direction == first and key == "auroc" and name in GALLERY_AWARE and not full:
                    heads = "gallery-aware: AUROC", GALLERY_AWARE[name]
                    columns.append(Column(full_key, *heads, 3, read, best, note=f"AUROC of the {heads[1]}"))
                else:
                    shown = full and key not in HIDDEN
                    columns.append(Column(full_key, group, title, 3, read, best, note=note, shown=shown))
            for coverage in COVERAGES:
                read = partial(_of, name, direction, ("selective_recall", coverage), scale=100)
                key, title = f"{direction}_{name}_of_surest_{coverage}", f"{right} of {coverage} %"
                note = f"{right} in % if only the surest {coverage} % are answered"
                columns.append(Column(key, group, title, 1, read, note=note, shown=full and coverage == COVERAGES[0]))
            read = partial(_of, name, direction, ("selective_coverage", RISK), scale=100)
            key, title = f"{direction}_{name}_coverage_at_{RISK}", f"coverage at {RISK} % risk"
            note = f"share of queries, in %, that can be answered with {RISK} % of the answers wrong"
            columns.append(Column(key, group, title, 1, read, note=note, shown=full))
    note = "Query-only uncertainty is known before any search; gallery-aware uncertainty needs scores over the gallery."
    note += constant(block, directions, ("query",))
    return make(
        "selective", f"Selective answers, {directions[first]}", columns, rows_of(block, columns, own_or_free), note
    )


def _of(name, direction, path, values, selector, scale=1):
    """What stands at `path` of an uncertainty's record; a row of one that needs no model has no others."""
    if selector.uncertainty:
        return record(direction, path, values, selector, scale=scale) if name == "query" else None
    return record(direction, path, values, selector, name, scale)


def _family(direction, values, selector):
    """Whether the uncertainty that levels follow is known before the search."""
    name = selector.uncertainty or values[direction]["levels_by"]
    return find(values, direction, "uncertainty", name, "family")


def _level(direction, level, values, selector):
    """R@1 of one level, or its limit, in percent."""
    path = ("levels", "recall", "1") if selector.of_level == "recall" else ("levels", selector.of_level)
    return record(direction, (*path, level), values, selector, scale=100)


def _sizes(block):
    """How many queries a level has: "of 500 captions and of 100 images", or "of 8 or 9 captions"."""
    sizes = []
    for direction, unit in (("text_to_image", "captions"), ("image_to_text", "images")):
        counts = level_counts(block.first[direction])
        if counts:
            sizes.append(f"of {' or '.join(f'{count:,}' for count in sorted(set(counts)))} {unit}")
    return " and ".join(sizes) or "all queries being equally uncertain"
