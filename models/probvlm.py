"""ProbVLM (Upadhyay et al., arXiv 2307.00398): embeddings are generalized Gaussians in every dimension.

A BayesCap network per modality (arXiv 2207.06873) predicts a mean, a scale alpha and a shape beta. The intra-modal term
of the loss is the likelihood of the embedding itself, the cross-modal term that of its match in the other modality.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import COSINE_SCALE, Adaptor, Embedding, Mean, perceptron
from models.distributions import GeneralizedGaussian
from models.pair_loss import PairScore
from models.precision import Perceptron
from utils.errors import one_of

EPS = 1e-4  # added to 1 / alpha and beta in every likelihood, as in the public code
LIKELIHOOD_WEIGHT, CROSS_WEIGHT = 5e-2, 1e-4  # relative to the L1 distance; relative to the intra-modal term
# For beta < 1 the likelihood has a cusp at a residual of zero; above this value its gradient stays integrable there.
LOWEST_BETA = 0.5


class BayesCap(nn.Module):
    """Mean, 1 / alpha and beta, each (N, D), of embeddings (N, D); Upadhyay et al. (2022), arXiv 2207.06873.

    mean: `learned`, the reconstruction; `residual` or `frozen`, see models.base.Mean, at the embedding's own length.
    """

    def __init__(self, dim: int, mean: str, width: int, dropout: float, lowest_beta: float):
        super().__init__()
        self.kind, self.lowest_beta = mean, lowest_beta
        layers = list(perceptron(dim, width, dim, hidden=2))
        self.trunk = Perceptron(*layers[:-1], nn.Dropout(dropout), layers[-1])
        self.mean = perceptron(dim, dim, dim, hidden=1) if mean == "learned" else Mean(mean, dim, width, hidden=2)
        # All pairs share an offset from a kept mean to the other modality. Unless it is learned, alpha absorbs it.
        self.gap = 0.0 if mean == "learned" else nn.Parameter(torch.zeros(dim))
        self.inverse_alpha = perceptron(dim, dim, dim, hidden=1)
        self.beta = perceptron(dim, dim, dim, hidden=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.trunk(x) + x
        if self.kind == "learned":
            mean = self.mean(features)
        else:
            mean = x.norm(dim=-1, keepdim=True) * self.mean(F.normalize(x, dim=-1))
        return mean, F.softplus(self.inverse_alpha(features)), self.lowest_beta + F.softplus(self.beta(features))


class ProbVLM(Adaptor):
    """Images and captions as generalized Gaussians in every dimension; Upadhyay et al. (2023), arXiv 2307.00398.

    mean: see BayesCap. likelihood: `exact`, or `surrogate`, linear in the residual, as published (beta then learns
    nothing, see `surrogate_nll`). width, dropout: of the trunk. normalize: scale embeddings to length sqrt(D), at which
    scales start well, instead of keeping their length. reciprocal: report 1 / variance as uncertainty, as published but
    wrong (larger = more certain). temperature: see Adaptor.
    """

    def __init__(
        self,
        dim: int,
        mean: str = "frozen",
        likelihood: str = "exact",
        width: int = 1024,
        dropout: float = 0.0,
        normalize: bool = True,
        reciprocal: bool = False,
        temperature: str = "exp",
    ):
        super().__init__(temperature)
        exact = one_of("likelihood", likelihood, ("exact", "surrogate")) == "exact"
        self.nll = exact_nll if exact else surrogate_nll
        self.variance = geometric_variance if exact else published_variance
        self.normalize, self.reciprocal = normalize, reciprocal
        self.image, self.text = (
            BayesCap(dim, mean, width, dropout, LOWEST_BETA if exact else 0.0) for _ in ("image", "text")
        )

    def _input(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 if self.normalize else x

    def _adapt(self, head: BayesCap, x: Tensor) -> Embedding:
        x = self._input(x)
        mean, inverse_alpha, beta = head(x)
        variance = self.variance(inverse_alpha, beta)
        uncertainty = 1 / variance if self.reciprocal else variance
        return Embedding(mean, uncertainty, spread=torch.stack((inverse_alpha, beta, x), dim=1))

    def adapt_image(self, image: Tensor) -> Embedding:
        """Adapt images (N, D): mean, variance (N,), and as spread (N, 3, D) 1 / alpha, beta and the embedding."""
        return self._adapt(self.image, image)

    def adapt_text(self, text: Tensor) -> Embedding:
        return self._adapt(self.text, text)

    def log_likelihood(self, image: Embedding, text: Embedding) -> Tensor:
        """Log density (N, M) of each image's embedding under each caption's distribution, plus the reverse.

        A matched pair's score is minus its exact cross-modal term, so the loss trains the score that ranks.
        """
        under_text = density(text.mean + self.text.gap, text.spread[:, 0], text.spread[:, 1])
        under_image = density(image.mean + self.image.gap, image.spread[:, 0], image.spread[:, 1])
        return under_text.pairwise_log_prob(image.spread[:, 2]) + under_image.pairwise_log_prob(text.spread[:, 2]).T

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """L1 distance and weighted likelihood () of B pairs (B, D), (B, D); arXiv 2307.00398, section 3.2.

        A learned mean has the intra- and the cross-modal term, as published. A frozen or residual mean reconstructs the
        embedding perfectly, so the intra-modal likelihood would grow without bound. There the cross-modal term trains
        the scale, and InfoNCE the correction, which an L1 distance would pull to the batch's mean.
        """
        image, text = self._input(image), self._input(text)
        means = []
        total = 0
        for head, embedding, match in ((self.image, image, text), (self.text, text, image)):
            mean, inverse_alpha, beta = head(embedding)
            means.append(F.normalize(mean, dim=-1, eps=1e-3))
            if head.kind == "learned":
                total = total + self._term(embedding, mean, inverse_alpha, beta)
                total = total + CROSS_WEIGHT * self._term(match, mean, inverse_alpha, beta)
            else:
                total = total + self._term(match, mean.detach() + head.gap, inverse_alpha, beta)
        if self.image.kind == "residual":
            total = total + PairScore(*means, slope=COSINE_SCALE).info_nce()
        return total

    def _term(self, target: Tensor, mean: Tensor, inverse_alpha: Tensor, beta: Tensor) -> Tensor:
        likelihood = self.nll(target, mean, inverse_alpha, beta).mean()
        return (target - mean).abs().mean() + LIKELIHOOD_WEIGHT * likelihood


def density(mean: Tensor, inverse_alpha: Tensor, beta: Tensor) -> GeneralizedGaussian:
    return GeneralizedGaussian(mean, 1 / (inverse_alpha + EPS), beta + EPS, validate_args=False)


def exact_nll(target: Tensor, mean: Tensor, inverse_alpha: Tensor, beta: Tensor) -> Tensor:
    """Negative log density (B, D) of targets (B, D); arXiv 2307.00398, equation 3."""
    return -density(mean, inverse_alpha, beta).log_prob(target)


def surrogate_nll(target: Tensor, mean: Tensor, inverse_alpha: Tensor, beta: Tensor) -> Tensor:
    """The public code's loss (B, D): beta |r| / alpha in place of (|r| / alpha)^beta.

    The optimal alpha is beta |r|, which leaves log Gamma(1/beta), minimal at beta = 0.68417 for any data.
    """
    inverse_alpha, beta = inverse_alpha + EPS, beta + EPS
    distance = ((mean - target).abs() * inverse_alpha * beta).clamp(1e-4, 1e3)
    return distance - inverse_alpha.log() + torch.lgamma(1 / beta) - beta.log()


def geometric_variance(inverse_alpha: Tensor, beta: Tensor) -> Tensor:
    """Geometric mean (N,) over D of the variances of (N, D).

    The few dimensions of smallest beta, where Gamma(3/beta) is huge, would dominate an arithmetic mean.
    """
    return density(torch.zeros_like(beta), inverse_alpha, beta).log_variance.mean(dim=-1).exp()


def published_variance(inverse_alpha: Tensor, beta: Tensor) -> Tensor:
    """Mean (N,) over D of the variances of (N, D), clipped as in the public code, which bounds Gamma(3/beta)."""
    alpha, beta = (1 / (inverse_alpha + 1e-5)).clamp(1e-4, 5), (beta + 0.1).clamp(0.1, 5)
    return GeneralizedGaussian(torch.zeros_like(beta), alpha, beta, validate_args=False).variance.mean(dim=-1)
