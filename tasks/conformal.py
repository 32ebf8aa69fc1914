"""Conformal sets: the smallest sets of answers that hold a right one with a stated probability, and what they cover."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from metrics import conformal, retrieval
from metrics.comparison import PairedBootstrap, interval
from tasks import choose_levels_by, decisions
from utils.errors import UserError


def evaluate(adaptor, pairs, choices, device):
    """Evaluate the sets of every kind at every alpha in each direction; returns figures, and arrays for the .npz.

    Thresholds are for all queries, for each level of uncertainty and for each group of the user's (Mondrian). Raises
    UserError where too few images teach.
    """
    result, arrays = {"score": choices.scores[0], "alphas": [f"{alpha:g}" for alpha in choices.alphas]}, {}
    for name, measured in decisions.measured(adaptor, pairs, choices, device, _measure).items():
        for alpha in choices.alphas:
            _must_suffice(measured.facts["taught_by"]["images"], alpha)
        part, columns = measured.parts[0], decisions.joined(measured)
        by = choose_levels_by(choices.levels_by if name != "text_to_image" else None, part.uncertainty, part.of_answer)
        divisions = [_levels(columns[by or "entropy"], choices.levels)]
        if part.column is not None:
            divisions.append(_groups(np.concatenate([each.column for each in measured.parts])))
        figures, side = _evaluate(measured, columns, divisions, choices.alphas)
        fitted = {"levels_by": by or "entropy"} | _fitted(measured, columns, divisions[0], choices.alphas)
        result[name] = measured.facts | {"levels_by": by, "conformal": figures, "fitted": fitted}
        arrays |= {f"{name}_{key}": values for key, values in side.items()}
    return result, arrays


def _must_suffice(images, alpha):
    least = conformal.least_groups(alpha)
    if images < least:
        raise UserError(
            f"alpha {alpha:g} takes at least {least:,} images that teach, and here are {images:,}: add images, name a"
            " larger --val split, or raise --alpha."
        )


def _measure(part):
    """Nonconformity of the answers of each query, and what its level may follow: {name: (Q,)}."""
    columns, labels = {}, {"own": (part.side.query, part.side.item)}
    if part.true is not None:
        labels["true"] = part.true.nonzero()
    for label, positives in labels.items():
        for kind, ends in conformal.of_answers(part.side.score, part.side.gallery, *positives, part.side.scale).items():
            columns |= {f"{kind}_{label}_any": ends[:, 0], f"{kind}_{label}_all": ends[:, 1]}
    ranking = retrieval.rank(*part.own, part.side.scale)
    columns["entropy"] = ranking.entropy
    if part.uncertainty is not None:
        columns["query"] = part.uncertainty
    if part.of_answer is not None:
        columns["retrieved"] = part.of_answer[ranking.top]
    if {"query", "retrieved"} <= columns.keys():
        columns["sum"] = columns["query"] + columns["retrieved"]
    return columns


class Division(NamedTuple):
    """Queries of all parts sorted into groups, each of which has a threshold of its own."""

    name: str
    number: np.ndarray  # (Q,) the group of each query
    names: list  # of the groups
    edges: tuple = ()  # between groups that are levels of an uncertainty


def _levels(uncertainty, count):
    """Levels of all queries at once, those that teach and those that are judged: no label has a part in it."""
    edges = np.quantile(uncertainty, np.arange(1, count) / count)
    number = np.searchsorted(edges, uncertainty, side="right")
    return Division("levels", number, list(range(1, count + 1)), tuple(edges.tolist()))


def _groups(column):
    names, number = np.unique(column, return_inverse=True)
    return Division("groups", number, names.tolist())


def _limits(values, group, division, folds, alpha):
    """The threshold (Q,) of each judged query: of its division's group, set by the queries of its Fold that teach."""
    limits = np.full(len(values), math.inf)
    for fold in folds:
        for number in range(len(division.names)):
            inside = division.number == number
            teach = fold.taught_by & inside
            if teach.any():
                limits[fold.judged & inside] = conformal.threshold(values[teach], group[teach], alpha)
    return limits


class Subset:
    """Judged queries of one group of a Division: figures of their sets."""

    def __init__(self, name, rows, group, taught_by):
        self.name, self.rows, self.taught_by = name, rows, taught_by
        self.drawn = PairedBootstrap(group[rows]) if rows.any() else None
        _, of_group, size = np.unique(group[rows], return_inverse=True, return_counts=True)
        self.share, self.groups = 1 / size[of_group], len(size)  # every image counts once, as in a threshold

    def figures(self, covered, size, alpha):
        """Figures of sets: covered, size (Q,) of all judged queries. None where too few images teach."""
        record = {"name": self.name, "queries": int(self.rows.sum()), "taught_by": self.taught_by}
        if self.drawn is None or self.taught_by < conformal.least_groups(alpha):
            return record | {"coverage": None, "needs": conformal.least_groups(alpha)}
        covered, size = covered[self.rows], size[self.rows]
        rows = np.arange(len(size))
        hits, total = self.drawn.sums(
            np.concatenate([self.share * covered, self.share]), np.tile(rows, 2), np.repeat([0, 1], len(rows)), 2
        ).T
        record |= {"coverage": float(hits[0] / total[0]), "interval": interval(hits / total)}
        record["expected"] = conformal.expected_coverage(self.taught_by, self.groups, alpha)
        quartiles = np.quantile(size, [0.25, 0.5, 0.75], method="inverted_cdf").tolist()
        mean = self.drawn.mean(size)
        record |= {"median_size": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]}
        record |= {"mean_size": float(mean[0]), "mean_size_interval": interval(mean)}
        return record | {"empty": float((size == 0).mean()), "single": float((size == 1).mean())}


def _subsets(measured, division):
    group, judged = measured.group, np.arange(len(measured.group)) < len(measured.parts[0].group)
    result = []
    for number, name in enumerate(division.names):
        inside = division.number == number
        taught_by = min(len(np.unique(group[fold.taught_by & inside])) for fold in measured.folds)
        result.append(Subset(name, inside[judged], group[judged], taught_by))
    return result


def _evaluate(measured, columns, divisions, alphas):
    """Figures of every kind and alpha, {kind: {alpha: {...}}}, and per-query arrays."""
    part, group = measured.parts[0], measured.group
    queries = len(part.group)
    whole = Division("all", np.zeros(len(group), int), ["all"])
    plans = [(whole, "any"), *((division, "any") for division in divisions)]
    if len(part.side.query) > queries:  # a query has several answers
        plans.append((whole, "all"))
    limits = {
        kind: np.stack(
            [
                _limits(columns[f"{kind}_own_{end}"], group, division, measured.folds, alpha)[:queries]
                for alpha in alphas
                for division, end in plans
            ],
            axis=1,
        )
        for kind in conformal.KINDS
    }
    sizes = conformal.sizes(part.side.score, part.side.gallery, queries, limits, part.side.scale)
    subsets = {division.name: _subsets(measured, division) for division in (whole, *divisions)}
    figures = {kind: {} for kind in conformal.KINDS}
    arrays = {"level": divisions[0].number[:queries], "group": part.group}
    for kind in conformal.KINDS:
        for number, (alpha, (division, end)) in enumerate(itertools.product(alphas, plans)):
            record = figures[kind].setdefault(f"{alpha:g}", {})
            limit, size = limits[kind][:, number], sizes[kind][:, number]
            covered = columns[f"{kind}_own_{end}"][:queries] <= limit
            each = [subset.figures(covered, size, alpha) for subset in subsets[division.name]]
            if division is not whole:
                record[division.name] = each
                arrays |= {f"{kind}_{alpha:g}_{division.name}_size": size}
            elif end == "all":
                record["all_answers"] = each[0]
            else:
                record |= each[0]
                # One threshold for all promises nothing for a level.
                record["within"] = [subset.figures(covered, size, alpha) for subset in subsets["levels"]]
                arrays |= {f"{kind}_{alpha:g}_size": size, f"{kind}_{alpha:g}_covered": covered}
                arrays[f"{kind}_nonconformity"] = columns[f"{kind}_own_any"][:queries]  # to redraw who teaches
                if f"{kind}_true_any" in columns:
                    record["true_coverage"] = float((columns[f"{kind}_true_any"][:queries] <= limit).mean())
    return figures, arrays


def _fitted(measured, columns, division, alphas):
    """Thresholds by all that teach, for queries to come: of all and by level, None for an infinite one."""
    teach = np.logical_or.reduce([fold.taught_by for fold in measured.folds])
    group, number = measured.group, division.number

    def threshold(kind, rows, alpha):
        limit = conformal.threshold(columns[f"{kind}_own_any"][rows], group[rows], alpha) if rows.any() else math.inf
        return limit if math.isfinite(limit) else None

    return {
        "edges": list(division.edges),
        "scale": measured.parts[0].side.scale,
        "thresholds": {
            kind: {
                f"{alpha:g}": {
                    "all": threshold(kind, teach, alpha),
                    "levels": [
                        threshold(kind, teach & (number == level), alpha) for level in range(len(division.names))
                    ],
                }
                for alpha in alphas
            }
            for kind in conformal.KINDS
        },
    }
