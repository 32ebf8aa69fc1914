"""The base of PFE, PCME++ and ProLIP: images and captions as Gaussians N(mu, diag sigma^2) in the embedding space.

A perceptron per modality predicts log sigma^2 from the frozen embedding. With S the sum of sigma^2 over coordinates,
the expected squared distance of samples is E|Z_i - Z_t|^2 = |mu_i - mu_t|^2 + S_i + S_t: no tensor of size B x B x D.
On unit means it is 2 - 2 match with match = cos - (S_i + S_t)/2, so the logits of PCME++, b - a (2 - 2 match), and of
ProLIP, a match + b, are the same function with different parametrizations of scale and shift.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Adaptor, Embedding, Mean, perceptron
from models.pair_loss import PairScore
from utils.errors import one_of


class Gaussian(Adaptor):
    """Diagonal Gaussians of both modalities; `spread` is log sigma^2 (N, D), `uncertainty` the mean of sigma^2 over D.

    mean, width, hidden: see Mean; the perceptrons of log sigma^2 have the same width and depth. start: S before
    training, or None for the perceptron's own initialization, about D. floor: added to every sigma^2.
    """

    def __init__(self, dim: int, mean: str, width: int, hidden: int, start: float | None, floor: float):
        super().__init__()
        if floor < 0 or (start is not None and start <= 0):
            raise ValueError(f"start must be above 0 and floor at least 0, not {start} and {floor}")
        self.dim = dim
        self.image_mean, self.text_mean = (Mean(mean, dim, width, hidden) for _ in range(2))
        self.image_log_variance, self.text_log_variance = (perceptron(dim, width, dim, hidden) for _ in range(2))
        self.log_floor = math.log(floor) if floor else -math.inf
        # Squared distances of unit means differ by less than 2 between pairs. With the perceptron's initialization S
        # is about D = 512 and every logit is hundreds below zero: the first steps then push log sigma^2 so far down
        # that its gradient, proportional to sigma^2, vanishes for good.
        if start is not None:
            for head in (self.image_log_variance, self.text_log_variance):
                nn.init.constant_(head[-1].bias, math.log(start / dim))

    def adapt_image(self, image: Tensor) -> Embedding:
        return self._adapt(image, self.image_mean, self.image_log_variance)

    def adapt_text(self, text: Tensor) -> Embedding:
        return self._adapt(text, self.text_mean, self.text_log_variance)

    def _adapt(self, x: Tensor, mean: nn.Module, head: nn.Module) -> Embedding:
        x = self._input(x)
        log_variance = self._log_variance(head(x))
        return Embedding(mean(x), log_variance.exp().mean(dim=-1), log_variance)

    def _input(self, x: Tensor) -> Tensor:
        """Input of the perceptrons: directions, so that caches of unit and of raw embeddings give the same result."""
        return F.normalize(x, dim=-1)

    def _log_variance(self, output: Tensor) -> Tensor:
        """log sigma^2 (N, D) from the perceptron's output, in logarithms because sigma^2 may underflow."""
        return torch.logaddexp(output, output.new_full((), self.log_floor))


class PairwiseGaussian(Gaussian):
    """Gaussians whose logit of "this pair matches" is affine in `match`, with a learned scale and shift.

    scale: `exp`, the exponential of a learned number; `free`, learned with either sign, as published; `fixed`, 1 with
    a shift of 0. first_scale, first_shift: initial values. vib: weight of the KL divergence to N(0, I). same_image:
    whether all captions of an image are its positives, or only the one it was sampled with.
    """

    match_logit = True

    def __init__(self, *args, scale: str, first_scale: float, first_shift: float, vib: float, same_image: bool):
        super().__init__(*args)
        self._scale_kind = one_of("scale", scale, ("exp", "free", "fixed"))
        self.vib, self.same_image = vib, same_image
        factors = torch.randint(2**62, (self.dim,), generator=torch.Generator().manual_seed(0))
        self.register_buffer("hash_factors", factors, persistent=False)
        self.shift = 0.0 if scale == "fixed" else nn.Parameter(torch.tensor(float(first_shift)))
        if scale == "exp":
            self.log_scale = nn.Parameter(torch.tensor(math.log(first_scale)))
        elif scale == "free":
            self.free_scale = nn.Parameter(torch.tensor(float(first_scale)))

    @property
    def affine(self) -> tuple[Tensor | float, Tensor | float]:
        """Slope and offset of the logit as a function of `match`."""
        raise NotImplementedError

    @property
    def scale(self) -> Tensor | float:
        if self._scale_kind == "exp":
            return self.log_scale.exp()
        return self.free_scale if self._scale_kind == "free" else 1.0

    def groups(self, image: Tensor) -> Tensor:
        """Number (B,) the images (B, D): the captions of images of the same number are positives of each of them."""
        if not self.same_image:
            return torch.arange(len(image), device=image.device)
        # Equal rows are the same image. They are compared by a hash of their bits: B^2 comparisons instead of B^2 D.
        # Integer sums wrap around and do not round, so their order does not matter.
        return (image.float().view(torch.int32).long() * self.hash_factors).sum(dim=-1)

    def pair_score(self, image: Embedding, text: Embedding) -> PairScore:
        """Match logit (N, M), affine in match = cos - (S_i + S_t)/2."""
        half = image.mean.shape[-1] / 2  # S is D times the mean variance
        slope, offset = self.affine
        row, column = (-slope * half * side.uncertainty for side in (image, text))
        return PairScore(image.mean, text.mean, slope=slope, column=column + offset, row=row)

    def kl(self, embedding: Embedding) -> Tensor:
        """KL divergence () to N(0, I) in nats, mean over items and coordinates; its weight is `vib`."""
        return kl_to_standard_normal(embedding.mean, embedding.spread)


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) () in nats, mean over items and coordinates (N, D)."""
    return (log_variance.exp() + mean.square() - 1 - log_variance).mean() / 2
