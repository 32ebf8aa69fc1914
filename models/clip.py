"""Plain CLIP (Radford et al., arXiv 2103.00020): points on the sphere, no uncertainty, no training."""

from models.base import Adaptor


class Clip(Adaptor):
    """Images and captions as points, scored by cosine: the deterministic baseline; Radford et al., arXiv 2103.00020."""

    needs_pairs = False

    def __init__(self, dim: int):
        super().__init__()

    def prepare(self, pairs, bank=None, quiet: bool = False) -> None:
        """Use the frozen model's logit scale as `posterior_scale`."""
        self.given_scale.fill_(pairs.meta["logit_scale"])
