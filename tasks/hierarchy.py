"""Hierarchy: whether uncertainty falls along chains of prompts that go from general to specific."""

import numpy as np

from metrics import uncertainty
from models.base import adapt_all
from tasks import doubts_of
from utils.errors import UserError


def evaluate(adaptor, pairs, choices, device):
    """Judge the captions' uncertainty by chains of prompts; returns the figures, and per-prompt arrays for the .npz.

    Beside the adaptor's stand two that cost nothing: how long the frozen embedding is, and how few words there are.
    Raises UserError where there are no chains.
    """
    if pairs.chains is None:
        raise UserError(f"{pairs.folder} has no chains of prompts, which --task hierarchy is about.")
    embeddings, (chain, depth) = pairs.chains["text"], (pairs.chains[name] for name in ("chain", "depth"))
    own = doubts_of(adapt_all(adaptor.adapt_text, pairs.fed("prompt", adaptor.pooled), device))
    doubts = {"query": own} if own is not None else {}
    doubts["long embedding"] = np.linalg.norm(np.asarray(embeddings, dtype=np.float64), axis=1)
    doubts["few words"] = -np.array([len(prompt.split()) for prompt in pairs.items["prompt"]], dtype=np.float64)
    figures = {"chains": len(np.unique(chain)), "prompts": len(chain)}
    figures["uncertainty"] = {name: judge(doubt, chain, depth) for name, doubt in doubts.items()}
    arrays = {"chain": chain, "depth": depth} | ({"chain_uncertainty": own} if own is not None else {})
    return {"hierarchy": figures}, arrays


def judge(doubt, chain, depth):
    """Figures of an uncertainty (K,) of prompts."""
    chains, steps = uncertainty.falling_chains(doubt, chain, depth)
    spearman = uncertainty.depth_correlation(doubt, chain, depth)
    figures = {"falling_chains": chains, "falling_steps": steps}
    figures |= {"spearman_depth": spearman.pooled, "spearman_depth_within_chains": spearman.within}
    means = {str(d): float(doubt[depth == d].mean()) for d in np.unique(depth)}
    return figures | {"mean_by_depth": means}
