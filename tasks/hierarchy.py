"""Hierarchy: whether uncertainty falls along chains of prompts from general to specific."""

import numpy as np

from metrics.uncertainty import depth_correlation, falling_chains
from models.base import adapt_all
from tasks import few_words, lengths, uncertainty_of
from utils.errors import UserError


def evaluate(adaptor, pairs, choices, device):
    """Evaluate the uncertainty of chained prompts; returns the figures, and per-prompt arrays for the .npz.

    Two baselines need no adaptor: the length of the frozen embedding and the number of words. Raises UserError if there
    are no chains.
    """
    if pairs.chains is None:
        raise UserError(f"{pairs.folder} has no chains of prompts, which --task hierarchy needs.")
    embeddings, chain, depth = (pairs.chains[name] for name in ("text", "chain", "depth"))
    arrays, uncertainties = {"chain": chain, "depth": depth}, {}
    uncertainty = uncertainty_of(adapt_all(adaptor.adapt_text, pairs.fed("prompt", adaptor.pooled), device))
    if uncertainty is not None:
        arrays["chain_uncertainty"] = uncertainties["query"] = uncertainty
    uncertainties |= {"long embedding": lengths(embeddings), "few words": few_words(pairs.items["prompt"])}
    figures = {"chains": len(np.unique(chain)), "prompts": len(chain)}
    figures["uncertainty"] = {name: summarize(values, chain, depth) for name, values in uncertainties.items()}
    return {"hierarchy": figures}, arrays


def summarize(uncertainty, chain, depth):
    """Figures of the uncertainty of K prompts; uncertainty, chain, depth: (K,)."""
    chains, steps = falling_chains(uncertainty, chain, depth)
    spearman = depth_correlation(uncertainty, chain, depth)
    return {
        "falling_chains": chains,
        "falling_steps": steps,
        "spearman_depth": spearman.pooled,
        "spearman_depth_within_chains": spearman.within,
        "mean_by_depth": {str(d): float(uncertainty[depth == d].mean()) for d in np.unique(depth)},
    }
