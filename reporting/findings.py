"""What a report found, in sentences: what a page opens with."""

import math
import statistics

from reporting.curves import BASE, TITLES
from reporting.runs import baseline_of, find
from reporting.tables.gains import FIGURES, gains_of
from reporting.words import MINUS, REAL, SIGNIFICANT

# By task: the table and the figure that stand below the sentences.
OPENING = {
    "retrieval": ("gains", "overview"),
    "comparison": ("differences_nll", ""),
    "active": ("accuracy", "learning_curves"),
}


def sentences(part):
    """The findings of a part of a report, one fact a sentence; empty where there is nothing to compare."""
    return {"retrieval": _retrieval, "comparison": _comparison, "active": _study}[part.task](part)


def _retrieval(block):
    """Every method against the baseline: recall, query-only uncertainty, true ambiguity."""
    gains, base = gains_of(block), baseline_of(block)
    if not gains:
        return []
    text = [_recall(gains[figure.key], figure, base) for figure in FIGURES[:2]]
    if "query_auroc" in gains:
        text += _before_the_search(gains, base)
    return text + _truth(block, base)


def _recall(by_variant, figure, base):
    """Which methods have a significantly higher or lower R@1."""
    differences = {
        variant: figure.scale * gain.difference.mean for variant, gain in by_variant.items() if gain.significant
    }
    start = f"R@1 {figure.title}: {base} has {figure.scale * by_variant[base].value:.{figure.digits}f} %."
    if not differences:
        return f"{start} No method differs from it beyond the sampling error of the images."
    return " ".join([start, *_higher_and_lower(differences, figure.digits)])


def _higher_and_lower(differences, digits):
    """Sentences that list the names of positive and of negative differences, {name: value}."""
    text = []
    for word, sign in (("higher", 1), ("lower", -1)):
        names = [f"{name} ({_signed(value, digits)})" for name, value in differences.items() if sign * value > 0]
        if names:
            text.append(f"Significantly {word}: {', '.join(names)}.")
    return text


def _before_the_search(gains, base):
    """How well learned uncertainties tell wrong answers, beside the baseline's entropy."""
    by_variant = {variant: gain for variant, gain in gains["query_auroc"].items() if math.isfinite(gain.value)}
    free = {name: by_variant.pop(name) for name in [*by_variant] if name.startswith(f"{base}, ")}
    entropy = gains["entropy_auroc"][base].value
    if not by_variant or not math.isfinite(entropy):
        return []
    best = max(by_variant, key=lambda variant: by_variant[variant].value)
    above, below = (
        sum(gain.significant and sign * gain.difference.mean > 0 for gain in by_variant.values()) for sign in (1, -1)
    )
    return [
        f"Before the search, the best query-only uncertainty tells wrong from right answers with an AUROC of"
        f" {by_variant[best].value:.3f} ({best}). The entropy of {base} over the gallery, which needs the search but no"
        f" training, has {entropy:.3f}.",
        f"Learned query-only uncertainties against that entropy: {above} significantly above, {below} significantly"
        f" below, {len(by_variant) - above - below} neither.",
        *(
            f"Without any model, {name.removeprefix(f'{base}, ')} has an AUROC of {gain.value:.3f}."
            for name, gain in free.items()
        ),
    ]


def _truth(block, base):
    """Which uncertainty follows true ambiguity best, where that is known; means over seeds."""
    correlations = {variant: _spearman(runs, "query") for variant, runs in block.results.items()}
    correlations = {variant: value for variant, value in correlations.items() if value is not None}
    entropy = _spearman(block.results[base], "entropy")
    if not correlations or entropy is None:
        return []
    best = max(correlations, key=correlations.get)
    return [
        f"True ambiguity of captions: the highest Spearman correlation of a query-only uncertainty is"
        f" {_signed(correlations[best], 3, '')} ({best}), that of the entropy of {base} {_signed(entropy, 3, '')}."
    ]


def _spearman(runs, name):
    values = [find(run.values, "text_to_image", "uncertainty", name, "spearman") for run in runs]
    return None if None in values else statistics.fmean(values)


def _comparison(block):
    """The differences in NLPD between classifiers whose interval leaves 0 out, as the table has them."""
    table = next((table for table in block.tables if table.name == OPENING["comparison"][0]), None)
    if table is None:
        return []
    text = []
    for row in (row for _, rows in table.groups for row in rows):
        for column in table.columns:
            cell = row.cells.get(column.key)
            if cell and cell.text.endswith(REAL):
                verdict = "better" if cell.mean < 0 else "worse"
                where = " ".join([column.group, column.title]).strip()
                text.append(f"NLPD on {where}, {row.name}: {cell.text.removesuffix(REAL)}, {verdict}.")
    return text or ["No difference in NLPD between the classifiers is beyond the sampling error of the images."]


def _study(study):
    """Which strategies of active learning differ from random choice, on average over the budgets."""
    text = []
    for figure in ("accuracy", "nll"):
        compared = study.gaps(figure)
        if compared:
            significant = {
                name: row[-1].difference.mean for name, row in compared.items() if row[-1].mark == SIGNIFICANT
            }
            start = f"Mean {TITLES[figure]} on {study.evaluated_on}, against {BASE}."
            verdict = _higher_and_lower(significant, 3) or ["No strategy differs beyond chance."]
            text.append(" ".join([start, *verdict]))
    return text


def _signed(value, digits, plus="+"):
    return f"{value:{plus}.{digits}f}".replace("-", MINUS)
