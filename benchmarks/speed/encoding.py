"""Encoding captions; benchmarks/caching.py measures where the time of caching goes."""

import torch

from benchmarks.measure import Case
from utils.config import load_backbone


def captions(device):
    """Encode 64 captions with ViT-B/32's text tower: cut to the longest caption, against the full 77 tokens."""
    from models.backbones.openclip import Backbone

    config = load_backbone("ViT-B-32-random")
    config.precision = "float32"  # as in the baseline
    backbone = Backbone(config, device)
    texts = [f"two dogs run over a green field in the rain {number}" for number in range(64)]

    def textbook():
        with torch.inference_mode():
            return backbone.model.encode_text(backbone.tokenizer(texts).to(device))

    # Weights of the tower's linear maps; those of embeddings are looked up.
    tower = backbone.model.text.named_parameters()
    weights = sum(p.numel() for name, p in tower if p.ndim == 2 and "embedding" not in name)
    longest = int((backbone.tokenizer(texts) != 0).sum(dim=1).max())
    return Case(lambda: backbone.encode_texts(texts), textbook, flops=2.0 * weights * longest * len(texts))


CASES = {"captions": captions}
