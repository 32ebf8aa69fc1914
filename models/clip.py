"""CLIP as it is: points on the sphere, no uncertainty, nothing to train (Radford et al., arXiv 2103.00020)."""

from models.base import Adaptor


class Clip(Adaptor):
    """The deterministic baseline: every score is the cosine of the frozen embeddings."""

    def __init__(self, dim: int):
        super().__init__()

    def prepare(self, pairs, quiet: bool = False) -> None:
        """Take the frozen model's own logit scale for the posterior over a gallery."""
        self.given_scale.fill_(pairs.meta["logit_scale"])
