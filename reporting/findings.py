"""What a report found, in sentences: each method against the baseline that needs no training."""

from reporting.runs import baseline_of, find
from reporting.tables.gains import FIGURES, gains_of
from reporting.words import MINUS


def sentences(block):
    """The findings of a block of retrieval, one fact a sentence; empty where there is no baseline."""
    gains, base = gains_of(block), baseline_of(block)
    if not gains:
        return []
    text = [_recall(gains[figure.key], figure, base) for figure in FIGURES[:2]]
    if "query_auroc" in gains:
        text += _before_the_search(gains, base)
    return text + _truth(block, base)


def _recall(by_variant, figure, base):
    """Which methods find really more or less than the baseline."""
    real = {variant: figure.scale * gain.difference.mean for variant, gain in by_variant.items() if gain.real}
    higher = [f"{variant} ({_signed(value, figure.digits)})" for variant, value in real.items() if value > 0]
    lower = [f"{variant} ({_signed(value, figure.digits)})" for variant, value in real.items() if value < 0]
    start = f"R@1 {figure.title}: {base} finds {figure.scale * by_variant[base].value:.{figure.digits}f} %."
    if not higher and not lower:
        return f"{start} No method differs from it beyond the sampling error of the images."
    parts = [f"Really more: {', '.join(higher)}."] if higher else []
    parts += [f"Really less: {', '.join(lower)}."] if lower else []
    return " ".join([start, *parts])


def _before_the_search(gains, base):
    """How well learned uncertainties tell wrong answers, beside the baseline's entropy."""
    by_variant, entropy = gains["query_auroc"], gains["entropy_auroc"][base].value
    best = max(by_variant, key=lambda variant: by_variant[variant].value)
    above = sum(gain.real and gain.difference.mean > 0 for gain in by_variant.values())
    below = sum(gain.real and gain.difference.mean < 0 for gain in by_variant.values())
    return [
        f"Before the search, the best query-only uncertainty tells wrong from right answers with an AUROC of"
        f" {by_variant[best].value:.3f} ({best}). The entropy of {base} over the gallery, which needs the search but no"
        f" training, has {entropy:.3f}.",
        f"Of {len(by_variant)} learned query-only uncertainties {above or 'none'} {'is' if above < 2 else 'are'} really"
        f" above that entropy, {below or 'none'} really below.",
    ]


def _truth(block, base):
    """Which uncertainty follows true ambiguity best, where that is known."""
    correlations = {
        variant: find(runs[0].values, "text_to_image", "uncertainty", "query", "spearman")
        for variant, runs in block.results.items()
    }
    correlations = {variant: value for variant, value in correlations.items() if value is not None}
    entropy = find(block.results[base][0].values, "text_to_image", "uncertainty", "entropy", "spearman")
    if not correlations or entropy is None:
        return []
    best = max(correlations, key=correlations.get)
    return [
        f"True ambiguity of captions: the highest Spearman correlation of a query-only uncertainty is"
        f" {_signed(correlations[best], 3, '')} ({best}), that of the entropy of {base} {_signed(entropy, 3, '')}."
    ]


def _signed(value, digits, plus="+"):
    return f"{value:{plus}.{digits}f}".replace("-", MINUS)
