"""A mixture of von Mises-Fisher densities, fitted by EM to the training embeddings of either modality.

N items, K components, D embedding size.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.density import SIDES, QueryOnly, by_blocks
from models.distributions.von_mises_fisher import concentration_of, log_normalizer

PRIOR = 1.0  # items without a direction that each component counts beside its own; they bound its concentration
STEPS, GAIN = 50, 1e-4  # of EM: at most so many, while each gains so many nats an item
MOST = 512  # components that are tried
HELD_OUT = 5  # one image in so many chooses the number of components


class Mixture(NamedTuple):
    """Components of a density on the sphere."""

    loc: Tensor  # (K, D) unit vectors, or zeros for a component that is uniform
    kappa: Tensor  # (K,)
    log_weight: Tensor  # (K,)


def components(cosine: Tensor, mixture: Mixture) -> Tensor:
    """Log weighted densities (N, K), in nats above the uniform density, at items of these cosines (N, K) with `loc`."""
    height = mixture.log_weight + log_normalizer(mixture.kappa, mixture.loc.shape[-1])
    return height + mixture.kappa * cosine


def log_density(x: Tensor, mixture: Mixture) -> Tensor:
    """Log density (N,) of a mixture at items (N, D) of any length, in nats above the uniform density."""
    return by_blocks(lambda cosine: components(cosine, mixture).logsumexp(dim=-1), x, mixture.loc)


def maximized(x: Tensor, share: Tensor) -> Mixture:
    """The mixture that maximizes the expected log posterior of unit vectors (N, D), which it owns by `share` (N, K).

    Banerjee et al. (2005), JMLR 6, section 4, with the exact concentration. Each concentration has the conjugate prior
    C_D(kappa)^PRIOR, without which one item, or many equal ones, would make it infinite.
    """
    count, resultant = share.sum(dim=0), share.T @ x
    length = resultant.norm(dim=-1) / (count + PRIOR)
    weight = count.clamp_min(torch.finfo(x.dtype).tiny) / len(x)
    return Mixture(F.normalize(resultant, dim=-1), concentration_of(length, x.shape[-1]), weight.log())


def fit(x: Tensor, count: int) -> Mixture:
    """Fit `count` components to unit vectors (N, D) by EM from k-means; a seed is drawn by torch's global generator."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    seed = int(torch.randint(2**31, ()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer distinct items than components
        label = KMeans(count, n_init=1, random_state=seed).fit(x.numpy()).labels_
    mixture = maximized(x, F.one_hot(torch.from_numpy(label).long(), count).to(x))
    last = -math.inf
    for _ in range(STEPS):
        parts = components(x @ mixture.loc.T, mixture)
        total = parts.logsumexp(dim=-1)
        penalty = PRIOR * log_normalizer(mixture.kappa, x.shape[-1]).sum()
        value = ((total.sum() + penalty) / len(x)).item()
        if value - last < GAIN:
            break
        last = value
        mixture = maximized(x, (parts - total[:, None]).exp())
    return mixture


def choose(x: Tensor, group: np.ndarray) -> int:
    """The power of 2 of components with the best log density of held-out unit vectors (N, D); 1 for too few groups.

    group: (N,) numbers; a group, as the captions of an image, is held out as a whole.
    """
    groups = np.unique(group)
    held_out = torch.from_numpy(np.isin(group, groups[torch.randperm(len(groups)).numpy() < len(groups) // HELD_OUT]))
    rest, best, count = x[~held_out], (-math.inf, 1), 1
    while held_out.any() and count <= min(MOST, len(rest) // 2):
        value = log_density(x[held_out], fit(rest, count)).mean().item()
        if value <= best[0]:
            break
        best, count = (value, count), 2 * count
    return best[1]


class VMFMixture(QueryOnly):
    """Uncertainty is the log density of a query in a mixture of von Mises-Fisher densities of its modality.

    components: how many, or None for the number that held-out images prefer, for either modality.
    """

    sized = tuple(f"{side}_{name}" for side in SIDES for name in Mixture._fields)

    def __init__(self, dim: int, components: int | None = None):
        super().__init__(dim)
        self.components = None
        if components is not None:
            self.require_positive(components=(components, int))
        for side in SIDES:
            self.store(side, Mixture(torch.zeros(1, dim), torch.zeros(1), torch.zeros(1)))

    def store(self, side: str, mixture: Mixture):
        """Keep a mixture as buffers, in float32 because not every device has float64."""
        for name, value in mixture._asdict().items():
            self.register_buffer(f"{side}_{name}", value.float().to(self.given_scale.device))

    def mixture(self, side: str) -> Mixture:
        """The mixture of a modality."""
        return Mixture(*(getattr(self, f"{side}_{name}") for name in Mixture._fields))

    def prepare(self, pairs, bank, quiet: bool = False) -> dict:
        """Fit both mixtures to the bank; returns `Pairs.seen` of its images."""
        super().prepare(pairs)
        for side in SIDES:
            x = F.normalize(getattr(bank, side).double(), dim=-1)
            group = bank.image_of_text.numpy() if side == "text" else np.arange(len(x))
            count = self.components or choose(x, group)
            self.store(side, fit(x, min(count, len(x))))
        return bank.seen

    def uncertainty(self, query: Tensor, side: str) -> Tensor:
        return self.log_density(query, side)

    def log_density(self, query: Tensor, side: str) -> Tensor:
        """That of the mixture."""
        return log_density(query, self.mixture(side))
