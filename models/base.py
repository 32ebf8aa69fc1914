"""The interface of a method, `Adaptor`, and the unified InfoNCE objective.

N images, M captions, B matched pairs, D embedding size. Frozen embeddings are not normalized.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.memory import empty
from models.pair_loss import PairScore, cross_entropies, info_nce, mean_of
from models.precision import Perceptron
from models.shares import current_share
from utils.config import MEANS
from utils.errors import one_of

COSINE_SCALE = 1 / 0.07  # factor on cosines in InfoNCE: CLIP's initial logit scale


class Embedding(NamedTuple):
    """Adapted embeddings of N items."""

    mean: Tensor  # (N, D)
    uncertainty: Tensor | None = None  # (N,) larger = less certain, for every method; None if the method has none
    spread: Tensor | None = None  # the method's own parameters: kappa (N,), log variance (N, D), ...
    direction: Tensor | None = None  # (N, D) of the mean, where `adapt_all` has computed it once for many scores

    def rows(self, index) -> "Embedding":
        """Select rows of every field."""
        return Embedding(*(None if field is None else field[index] for field in self))


class Adaptor(nn.Module):
    """A small model on top of frozen embeddings; a method overrides what it does differently.

    pooled: whether inputs also contain the inputs of the towers' last maps, (N, D + P) in all; see `Pairs.fed`.
    temperature: factor on the score in the InfoNCE objective: `fixed` at 1, `exp` of a learned number, or `free`, a
    learned factor of either sign as in the public AsymVLM code. The posterior over a gallery is the softmax of
    `posterior_scale` times the score. This scale is the temperature unless calibration on held-out pairs sets
    `given_scale`.
    """

    pooled = False
    match_logit = (
        False  # whether `log_likelihood` is the logit of "this pair matches" at the share of matches in a batch
    )
    compared_answers = 0  # best answers that `of_candidates` compares; 0 for a method without it
    needs_pairs = True  # False for a method that learns nothing from the training split, which may be of classes, then
    refit = None  # a method that learns in seconds where points lie has one, see `Linear.refit`

    def __init__(self, temperature: str = "fixed"):
        super().__init__()
        self._temperature_kind = one_of("temperature", temperature, ("fixed", "exp", "free"))
        self.register_buffer("given_scale", torch.tensor(float("nan")))
        if temperature == "exp":
            self.log_temperature = nn.Parameter(torch.zeros(()))
        elif temperature == "free":
            self.free_temperature = nn.Parameter(torch.ones(()))

    @property
    def temperature(self) -> Tensor | float:
        if self._temperature_kind == "exp":
            return self.log_temperature.exp()
        return self.free_temperature if self._temperature_kind == "free" else 1.0

    @property
    def posterior_scale(self) -> float:
        calibrated = self.given_scale.item()
        return float(torch.as_tensor(self.temperature).detach()) if math.isnan(calibrated) else calibrated

    def adapt_image(self, image: Tensor) -> Embedding:
        """Adapt frozen image embeddings (N, D)."""
        return Embedding(F.normalize(image, dim=-1))

    def adapt_text(self, text: Tensor) -> Embedding:
        """Adapt frozen caption embeddings (M, D)."""
        return Embedding(F.normalize(text, dim=-1))

    def similarity(self, image: Embedding, text: Embedding) -> Tensor:
        """Cosine of the means (N, M)."""
        return cosine(image, text)

    def log_likelihood(self, image: Embedding, text: Embedding) -> Tensor:
        """The method's own score (N, M): that of `pair_score` if it has one, else the similarity."""
        score = self.pair_score(image, text)
        return self.similarity(image, text) if score is None else score.dense()

    def pair_score(self, image: Embedding, text: Embedding) -> PairScore | None:
        """The method's own score in the form that needs no matrix to train; None for a `log_likelihood` without it."""
        return None

    def classify(self, image: Embedding, text: Embedding) -> Tensor:
        """Score (N, C) of images against all C classes: `log_likelihood`, or the logarithms of class probabilities."""
        return self.log_likelihood(image, text)

    def of_candidates(self, query: Embedding, answers: Embedding, side: str) -> dict[str, Tensor]:
        """Further uncertainties (N,) of queries (N, D) of a modality by their K best answers (N, K, D), best first.

        By name, of reporting/words.py: OF_CANDIDATES.
        """
        return {}

    def matched_scale(self, image: Embedding, text: Embedding) -> float | None:
        """The single temperature on the cosine that softens probabilities (N, C) as much as the method does on average.

        Everything else that the method does to them differs between items. None if there is no such temperature.
        """
        return None

    def unified_loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Unified InfoNCE loss () over `log_likelihood` of B pairs (B, D), (B, D): `--objective infonce`."""
        image, text = self.adapt_image(image), self.adapt_text(text)
        score = self.pair_score(image, text)
        if score is None:
            losses = cross_entropies(self.temperature * self._scores(image, text))
        else:
            losses = score.scaled(self.temperature).losses()
        return mean_of(losses) + self.auxiliary_loss(image, text, losses)

    def _scores(self, image, text):
        """`log_likelihood` (N, M), by processes that share a training step each for its rows."""
        share, count = current_share(), len(image.mean)
        if share is None:
            return self.log_likelihood(image, text)
        return share.gather(self.log_likelihood(image.rows(share.rows(count)), text), count)

    def auxiliary_loss(self, image: Embedding, text: Embedding, losses: tuple[Tensor, Tensor]) -> Tensor | float:
        """Term () that the unified objective adds to InfoNCE, of B adapted pairs and their losses.

        losses: the cross-entropies (B,) of the images over the captions, and (B,) of the captions over the images.
        """
        return 0.0

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """The method's own loss () of B pairs (B, D), (B, D): `--objective native`; by default `unified_loss`."""
        return self.unified_loss(image, text)

    def prepare(self, pairs, bank, quiet: bool = False) -> dict | None:
        """Read the cached training split, an opened `Pairs`, once before training.

        bank: a datasets.bank.Bank of pairs to learn from; the split also holds pairs that are held out. quiet: show no
        progress. Returns `Pairs.seen` of the images that something was learned from, or None.
        """


def cosine(image: Embedding, text: Embedding) -> Tensor:
    """Cosine of the means (N, M)."""
    image, text = (F.normalize(x.mean, dim=-1) if x.direction is None else x.direction for x in (image, text))
    return image @ text.T


@torch.inference_mode()
def adapt_all(adapt, embeddings, device, block: int = 8192) -> Embedding:
    """Apply `adaptor.adapt_image` or `.adapt_text` to the array of `Pairs.fed` block by block, on `device`.

    What would take half of the free memory is put into a file, see `memory.empty`.
    """
    whole = None
    for start in range(0, len(embeddings), block):
        part = adapt(torch.as_tensor(embeddings[start : start + block].copy()).to(device).float())
        part = part._replace(direction=F.normalize(part.mean, dim=-1))
        whole = whole or Embedding(*empty([None if field is None else field[0] for field in part], len(embeddings)))
        for field, values in zip(whole, part, strict=True):
            if field is not None:
                field[start : start + block] = values
    return whole


def best_temperature(scores: list[Tensor]) -> float:
    """The factor on score matrices (B, B), matches on the diagonal, that minimizes their mean InfoNCE.

    Temperature scaling: Guo et al. (2017), arXiv 1706.04599. If every pair is ranked first, a larger factor is always
    better; the result is then the factor whose loss is 1 / (number of pairs), the smallest loss they can resolve.
    """
    pairs = sum(map(len, scores))
    # A shift changes only the rounding. By the median, because one overfitted density may exceed all others by far.
    scores = [score - score.median() for score in scores]
    scatter = torch.stack([score.abs().median() for score in scores]).max().item()
    if scatter == 0:
        return 1.0

    def excess(log_factor: float) -> float:
        factor = math.exp(log_factor) / scatter
        losses = torch.stack([info_nce(factor * score) for score in scores]).tolist()  # one wait for the device
        return sum(len(score) * loss for score, loss in zip(scores, losses, strict=True)) / pairs - 1 / pairs

    # InfoNCE is convex in the factor, so it has one minimum.
    best = scipy.optimize.minimize_scalar(excess, bounds=(-10, 10), method="bounded", options={"xatol": 1e-3}).x
    if excess(best) < 0:
        best = scipy.optimize.brentq(excess, -10, best)
    return math.exp(best) / scatter


class Mean(nn.Module):
    """Unit mean (N, D) of frozen embeddings (N, D).

    kind: `frozen`, the embedding's direction; `residual`, that direction plus a learned correction that starts at zero;
    `learned`, a perceptron's output. width, hidden: of the perceptron.
    """

    def __init__(self, kind: str, dim: int, width: int, hidden: int):
        super().__init__()
        self.kind = one_of("mean", kind, MEANS)
        if kind != "frozen":
            self.head = perceptron(dim, width, dim, hidden)
        if kind == "residual":
            nn.init.zeros_(self.head[-1].weight)
            nn.init.zeros_(self.head[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        direction = F.normalize(x, dim=-1)
        if self.kind == "residual":
            # An embedding of zeros has no direction; 1 / eps bounds the gradient of the correction alone.
            return F.normalize(direction + self.head(x), dim=-1, eps=0.1)
        return direction if self.kind == "frozen" else F.normalize(self.head(x), dim=-1)


def perceptron(dim_in: int, width: int, dim_out: int, hidden: int) -> Perceptron:
    """Multilayer perceptron with `hidden` layers of `width` units and ReLU; raises ValueError for impossible sizes."""
    if width < 1 or hidden < 0:
        raise ValueError(f"a perceptron cannot have {hidden} hidden layers of width {width}")
    sizes = [dim_in] + [width] * hidden
    layers = []
    for size, following in pairwise(sizes):
        layers += [nn.Linear(size, following), nn.ReLU()]
    return Perceptron(*layers, nn.Linear(sizes[-1], dim_out))
