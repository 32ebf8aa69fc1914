"""ProbVLM: an embedding is a generalized Gaussian in every dimension, for both modalities (arXiv 2307.00398).

A BayesCap network per modality (arXiv 2207.06873) gives a mean, a scale alpha and a shape beta. The intra-modal term of
the loss is the likelihood of the embedding itself, the cross-modal term that of its match in the other modality.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import COSINE_SCALE, Adaptor, Embedding, Mean, info_nce, perceptron
from models.distributions import GeneralizedGaussian

EPS = 1e-4  # added to 1 / alpha and beta wherever a likelihood is formed, as in the public code
LIKELIHOOD_WEIGHT, CROSS_WEIGHT = 5e-2, 1e-4  # next to the L1 distance; next to the intra-modal term
# With beta < 1 the likelihood has a cusp at a residual of zero; above this its gradient there stays integrable.
LOWEST_BETA = 0.5


class BayesCap(nn.Module):
    """Mean, 1 / alpha and beta, each (N, D), of embeddings (N, D); Upadhyay et al. (2022), arXiv 2207.06873.

    mean: `learned`, the reconstruction; `residual` or `frozen`, see models.base.Mean, at the embedding's own length.
    """

    def __init__(self, dim: int, mean: str, width: int, dropout: float, lowest_beta: float):
        super().__init__()
        self.kind, self.lowest_beta = mean, lowest_beta
        layers = list(perceptron(dim, width, dim, hidden=2))
        self.trunk = nn.Sequential(*layers[:-1], nn.Dropout(dropout), layers[-1])
        self.mean = perceptron(dim, dim, dim, hidden=1) if mean == "learned" else Mean(mean, dim, width, hidden=2)
        # Between a kept mean and the other modality lies what all pairs have in common; unlearned, alpha would hold it.
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
    """Images and captions as generalized Gaussians.

    mean: see BayesCap. likelihood: `exact`, or `surrogate`, linear where the density has a power, as published (beta
    then learns nothing, see `surrogate_nll`). width, dropout: of the trunk. normalize: work on embeddings of length
    sqrt(D), at which scales start well, instead of their own. reciprocal: report 1 / variance as uncertainty, which is
    wrong (larger = more certain) but published. temperature: see Adaptor.
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
        if likelihood not in ("exact", "surrogate"):
            raise ValueError(f"likelihood must be exact or surrogate, not '{likelihood}'")
        exact = likelihood == "exact"
        self.nll, self.variance = (exact_nll, geometric_variance) if exact else (surrogate_nll, published_variance)
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
        """Give images (N, D) a mean, a variance (N,), and as spread (N, 3, D) 1 / alpha, beta and the embedding."""
        return self._adapt(self.image, image)

    def adapt_text(self, text: Tensor) -> Embedding:
        return self._adapt(self.text, text)

    def log_likelihood(self, image: Embedding, text: Embedding) -> Tensor:
        """Log density (N, M) of each image's embedding under each caption's distribution plus that of the reverse.

        A matched pair's score is minus its exact cross-modal term, so that what ranks is what the loss trains.
        """
        of_image, of_text = (
            density(own.mean + head.gap, own.spread[:, 0], own.spread[:, 1]).pairwise_log_prob(other.spread[:, 2])
            for head, own, other in ((self.text, text, image), (self.image, image, text))
        )
        return of_image + of_text.T

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """L1 distance and weighted likelihood () of B pairs (B, D), (B, D); arXiv 2307.00398, section 3.2.

        A learned mean has the intra- and the cross-modal term, as published. One that holds the embedding itself
        reconstructs it perfectly, so that the intra-modal likelihood grows without bound whatever the data: there the
        cross-modal term gives the scale, and InfoNCE the correction, which a distance would draw to the batch's mean.
        """
        image, text = self._input(image), self._input(text)
        means = []
        total = 0
        for head, own, other in ((self.image, image, text), (self.text, text, image)):
            mean, *shape = head(own)
            means.append(F.normalize(mean, dim=-1, eps=1e-3))
            if head.kind == "learned":
                total = total + self._term(own, mean, *shape) + CROSS_WEIGHT * self._term(other, mean, *shape)
            else:
                total = total + self._term(other, mean.detach() + head.gap, *shape)
        return total + info_nce(COSINE_SCALE * means[0] @ means[1].T) if self.image.kind == "residual" else total

    def _term(self, target: Tensor, mean: Tensor, inverse_alpha: Tensor, beta: Tensor) -> Tensor:
        likelihood = self.nll(target, mean, inverse_alpha, beta).mean()
        return (target - mean).abs().mean() + LIKELIHOOD_WEIGHT * likelihood


def density(mean: Tensor, inverse_alpha: Tensor, beta: Tensor) -> GeneralizedGaussian:
    return GeneralizedGaussian(mean, 1 / (inverse_alpha + EPS), beta + EPS, validate_args=False)


def exact_nll(target: Tensor, mean: Tensor, inverse_alpha: Tensor, beta: Tensor) -> Tensor:
    """Minus the log density (B, D) of targets (B, D); arXiv 2307.00398, equation 3."""
    return -density(mean, inverse_alpha, beta).log_prob(target)


def surrogate_nll(target: Tensor, mean: Tensor, inverse_alpha: Tensor, beta: Tensor) -> Tensor:
    """The public code's loss (B, D): beta |r| / alpha in place of (|r| / alpha)^beta.

    The best alpha is beta |r|, which leaves log Gamma(1/beta): at its minimum beta = 0.68417, whatever the data.
    """
    inverse_alpha, beta = inverse_alpha + EPS, beta + EPS
    distance = ((mean - target).abs() * inverse_alpha * beta).clamp(1e-4, 1e3)
    return distance - inverse_alpha.log() + torch.lgamma(1 / beta) - beta.log()


def geometric_variance(inverse_alpha: Tensor, beta: Tensor) -> Tensor:
    """Geometric mean (N,) over D of the variances of (N, D).

    An arithmetic mean would see nothing but the few dimensions of least beta, where Gamma(3/beta) is astronomic.
    """
    return density(torch.zeros_like(beta), inverse_alpha, beta).log_variance.mean(dim=-1).exp()


def published_variance(inverse_alpha: Tensor, beta: Tensor) -> Tensor:
    """Mean (N,) over D of the variances of (N, D), clipped as in the public code, which bounds Gamma(3/beta)."""
    alpha, beta = (1 / (inverse_alpha + 1e-5)).clamp(1e-4, 5), (beta + 0.1).clamp(0.1, 5)
    return GeneralizedGaussian(torch.zeros_like(beta), alpha, beta, validate_args=False).variance.mean(dim=-1)
