"""Training-free uncertainty of a query: how dense the bank of training embeddings is around it.

A generic query lies near many training embeddings, and is answered wrongly more often. Scores are plain CLIP's cosines.
N queries, B items of a bank, D embedding size.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Embedding
from models.clip import Clip
from models.distributions.von_mises_fisher import log_normalizer
from utils.errors import UserError

SIDES = {"image": "text", "text": "image"}  # each modality, and the other
TILE = 2**22  # cosines in memory at once: 16 MB in float32
LEAST = 4  # images of a bank that is split into galleries and the rest
MOST = 1000  # images of such a gallery
FLOOR = 1e-12  # of the variances of unit vectors, all of which may be equal


def by_blocks(of_cosines, query: Tensor, bank: Tensor) -> Tensor:
    """Apply `of_cosines`, from (n, B) to (n,), to the cosines of queries (N, D) with a bank (B, D), block by block."""
    query, bank = F.normalize(query, dim=-1), F.normalize(bank.to(query), dim=-1)
    blocks = query.split(max(1, TILE // max(1, len(bank))))
    return torch.cat([of_cosines(block @ bank.T) for block in blocks])


def nearest(query: Tensor, bank: Tensor, k: int) -> Tensor:
    """Mean (N,) of the `k` largest cosines with the bank (B, D), or of all if it has fewer items."""
    return by_blocks(lambda cosines: cosines.topk(min(int(k), len(bank))).values.mean(dim=-1), query, bank)


def kernel(query: Tensor, bank: Tensor, beta: float) -> Tensor:
    """Logarithm (N,) of the mean of exp(beta cosine) over the bank (B, D): a density by von Mises-Fisher kernels."""
    return by_blocks(lambda cosines: (beta * cosines).logsumexp(dim=-1), query, bank) - math.log(len(bank))


class QueryOnly(Clip):
    """Plain CLIP with an uncertainty (N,) of queries (N, D) of either modality, by the method `uncertainty`.

    sized: names of buffers whose sizes are set when they are stored or loaded.
    """

    needs_pairs = True
    sized = ()

    def adapt_image(self, image: Tensor) -> Embedding:
        """Adapt images (N, D)."""
        return super().adapt_image(image)._replace(uncertainty=self.uncertainty(image, "image"))

    def adapt_text(self, text: Tensor) -> Embedding:
        """Adapt captions (M, D)."""
        return super().adapt_text(text)._replace(uncertainty=self.uncertainty(text, "text"))

    def log_density(self, query: Tensor, side: str) -> Tensor | None:
        """Log density (N,) on the sphere of the modality `side` at queries (N, D), in nats above the uniform density.

        Its mean over the sphere is 1 before the logarithm. None for a method whose figure has no such normalizer: the
        cosine with neighbors, or a Mahalanobis distance.
        """
        return None

    def require_positive(self, **options):
        """Set the options; raises ValueError for one that is not a number above 0, or a whole one as its default."""
        for name, (value, kind) in options.items():
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
                whole = "whole " if kind is int else ""
                raise ValueError(f"{name} must be a {whole}number above 0, not {value!r}")
            setattr(self, name, value)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in self.sized:
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.given_scale.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Banked(QueryOnly):
    """It keeps the bank of its run as buffers."""

    sized = tuple(f"{side}_bank" for side in SIDES)

    def __init__(self, dim: int):
        super().__init__(dim)
        for side in SIDES:
            self.register_buffer(f"{side}_bank", torch.zeros(1, dim))

    def prepare(self, pairs, bank, quiet: bool = False) -> dict:
        """Keep the bank; returns `Pairs.seen` of its images."""
        super().prepare(pairs)
        for side in SIDES:
            # As drawn, in float16 and not normalized: torch.save writes it once for the adaptor and for the run.
            setattr(self, f"{side}_bank", getattr(bank, side).to(self.given_scale.device))
        return bank.seen

    def banks(self, side: str) -> tuple[Tensor, Tensor]:
        """The bank (B, D) of a modality, and that of the other."""
        return getattr(self, f"{side}_bank"), getattr(self, f"{SIDES[side]}_bank")


class KNN(Banked):
    """Uncertainty is the mean of the `k` largest cosines of a query with the bank of its modality."""

    def __init__(self, dim: int, k: int = 8):
        super().__init__(dim)
        self.require_positive(k=(k, int))

    def uncertainty(self, query: Tensor, side: str) -> Tensor:
        return nearest(query, self.banks(side)[0], self.k)


class KDE(Banked):
    """Uncertainty is the logarithm of the mean of exp(`beta` cosine) over the bank of the other modality."""

    def __init__(self, dim: int, beta: float = 20.0):
        super().__init__(dim)
        self.require_positive(beta=(beta, int | float))

    def uncertainty(self, query: Tensor, side: str) -> Tensor:
        return kernel(query, self.banks(side)[1], self.beta)

    def log_density(self, query: Tensor, side: str) -> Tensor:
        """That of the von Mises-Fisher kernels on the bank of the queries' own modality."""
        normalizer = log_normalizer(query.new_tensor(self.beta), query.shape[-1])
        return kernel(query, self.banks(side)[0], self.beta) + normalizer


class Typicality(QueryOnly):
    """Uncertainty is minus the Mahalanobis distance of a query's direction from those of its modality's bank.

    Whitened CLIP (arXiv 2505.06934), with unit vectors and the covariance shrunk by Ledoit and Wolf (2004).
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        for side in SIDES:
            self.register_buffer(f"{side}_center", torch.zeros(dim))
            self.register_buffer(f"{side}_whitener", torch.eye(dim))  # (D, D): distances are lengths after it

    def prepare(self, pairs, bank, quiet: bool = False) -> dict:
        """Fit mean and covariance of both modalities; returns `Pairs.seen` of the bank's images."""
        from sklearn.covariance import LedoitWolf

        super().prepare(pairs)
        for side in SIDES:
            fit = LedoitWolf().fit(F.normalize(getattr(bank, side).double(), dim=-1).numpy())
            variances, basis = np.linalg.eigh(fit.covariance_)
            getattr(self, f"{side}_center").copy_(torch.from_numpy(fit.location_).float())
            whitener = basis / np.sqrt(variances.clip(FLOOR))
            getattr(self, f"{side}_whitener").copy_(torch.from_numpy(whitener).float())
        return bank.seen

    def uncertainty(self, query: Tensor, side: str) -> Tensor:
        centered = F.normalize(query, dim=-1) - getattr(self, f"{side}_center")
        return -(centered @ getattr(self, f"{side}_whitener")).norm(dim=-1)


class Density(Banked):
    """Uncertainty is the probability of a wrong answer, by logistic regression on three densities of the bank.

    It is learned from galleries that are drawn from the bank, whose rest is their bank; it holds for galleries of that
    size, a quarter of the bank's images and at most 1,000. k, beta: as in KNN and KDE. penalty: on half the squared
    weights of standardized features, beside the sum of the losses. galleries: how many.
    """

    def __init__(self, dim: int, k: int = 8, beta: float = 20.0, penalty: float = 20.0, galleries: int = 6):
        super().__init__(dim)
        number = int | float
        self.require_positive(k=(k, int), beta=(beta, number), penalty=(penalty, number), galleries=(galleries, int))
        for side in SIDES:
            self.register_buffer(f"{side}_weight", torch.zeros(3))
            self.register_buffer(f"{side}_bias", torch.zeros(()))

    def prepare(self, pairs, bank, quiet: bool = False) -> dict:
        """Keep the bank and fit a regression for each modality; returns `Pairs.seen` of the bank's images.

        Raises UserError for a bank of fewer than 4 images.
        """
        if len(bank.image) < LEAST:
            raise UserError(
                f"the method splits its {len(bank.image)} training images into galleries and the rest: give it at least"
                f" {LEAST}, or take --method knn."
            )
        seen = super().prepare(pairs, bank)
        parts = [self.gallery(bank.image_of_text.to(self.image_bank.device)) for _ in range(self.galleries)]
        for side in SIDES:
            features, wrong = (torch.cat([part[side][i] for part in parts]).cpu().double().numpy() for i in (0, 1))
            weight, bias = regression(features, wrong > 0, self.penalty)
            getattr(self, f"{side}_weight").copy_(torch.from_numpy(weight).float())
            getattr(self, f"{side}_bias").fill_(bias)
        return seen

    def gallery(self, image_of_text: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Draw a gallery from the bank by torch's global generator: {modality: features (N, 3), answered wrongly (N,)}.

        image_of_text: (M,) of the bank.
        """
        images = len(self.image_bank)
        size = min(MOST, max(2, images // 4))
        inside = (torch.randperm(images) < size).to(image_of_text.device)
        chosen = {"image": inside, "text": inside[image_of_text]}
        query = {side: self.banks(side)[0][rows].float() for side, rows in chosen.items()}
        rest = {side: self.banks(side)[0][~rows] for side, rows in chosen.items()}
        target = (inside.cumsum(0) - 1)[image_of_text[chosen["text"]]]
        image, text = (F.normalize(query[side], dim=-1) for side in SIDES)
        cosines = image @ text.T
        wrong = {
            "image": target[cosines.argmax(dim=1)] != torch.arange(size, device=target.device),
            "text": cosines.argmax(dim=0) != target,
        }
        return {side: (self.features(query[side], rest[side], rest[SIDES[side]]), wrong[side]) for side in SIDES}

    def features(self, query: Tensor, same: Tensor, other: Tensor) -> Tensor:
        """Three densities (N, 3) of queries (N, D) in the banks of the same and of the other modality."""
        center = F.normalize(same.to(query), dim=-1).mean(dim=0, keepdim=True)
        to_center = (F.normalize(query, dim=-1) @ F.normalize(center, dim=-1).T).squeeze(-1)
        return torch.stack([nearest(query, same, self.k), kernel(query, other, self.beta), to_center], dim=-1)

    def uncertainty(self, query: Tensor, side: str) -> Tensor:
        logit = self.features(query, *self.banks(side)) @ getattr(self, f"{side}_weight")
        return (logit + getattr(self, f"{side}_bias")).sigmoid()


def regression(features: np.ndarray, wrong: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """L2 logistic regression of labels (N,) on features (N, F): weights (F,) and bias on features as they are.

    If all labels are equal, weights are 0 and the bias gives their smoothed share (n + 1/2) / (N + 1).
    """
    from sklearn.linear_model import LogisticRegression

    share = (wrong.sum() + 0.5) / (len(wrong) + 1)
    if wrong.all() or not wrong.any():
        return np.zeros(features.shape[1]), math.log(share / (1 - share))
    center, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    fit = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=1000).fit((features - center) / scale, wrong)
    weight = fit.coef_[0] / scale
    return weight, fit.intercept_[0] - weight @ center
