"""BayesVLM (Baumann et al., arXiv 2412.06014): a Laplace posterior on the towers' last linear layers, no training.

Embeddings become Gaussians, and each cosine gets a mean and a variance. N images, M captions, D embedding size, P size
of the input phi of a last layer W (D, P); phi ends in a 1 if the layer has a bias.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.backbones.last_map import cut
from models.base import Adaptor, Embedding
from models.laplace import (
    OBJECTIVES,
    PRIORS,
    Factors,
    Posterior,
    Spectrum,
    activation_factor,
    curvature,
    load_published,
    loss_of,
)
from models.prob_cosine import (
    VARIANCES,
    Gaussians,
    Half,
    half,
    independent_probabilities,
    joint_probabilities,
    mean_of,
    probit_factor,
    variance_of,
)
from utils.checkpoint import read_run
from utils.errors import UserError, one_of

SIDES = {"image": "text", "text": "image"}  # each modality, and that of its candidates
PROBABILITIES = ("mean", "probit", "mc-independent", "mc-joint")
SEEDS = {"image": 0, "text": 1}  # of draws: every block of images gets the same weights
STEP = 2048  # items between two steps of the progress bar
TILE = 2**22  # probit factors in memory at once


def draw_pairs(image_of_text, most: int):
    """Draw rows of at most `most` random images without replacement, and of a random caption of each.

    image_of_text: (M,) the image of each caption. Returns two arrays in the same order; uses torch's global generator.
    """
    captions = np.bincount(image_of_text)
    order, starts = np.argsort(image_of_text, kind="stable"), np.cumsum(captions) - captions
    images = np.flatnonzero(captions)
    images = images[torch.randperm(len(images)).numpy()[:most]]
    offsets = (torch.rand(len(images), dtype=torch.float64).numpy() * captions[images]).astype(np.int64)
    return images, order[starts[images] + offsets]


def seeds_of(embeddings: Tensor) -> list[int]:
    """Seeds of random numbers, one for each embedding (N, D), which depend on its bits alone."""
    bits = embeddings.float().cpu().contiguous().view(torch.int32).long()
    # Odd factors from a generator: a sum weighs every bit, and its high half, which the generator of noise ignores, is
    # folded into the low one.
    factors = 2 * torch.randint(2**62, bits.shape[1:], generator=torch.Generator().manual_seed(0)) + 1
    total = (bits * factors).sum(dim=1)
    return ((total ^ (total >> 32)) & (2**32 - 1)).tolist()


class Tower(nn.Module):
    """The posterior of a tower's last layer as buffers, whose sizes are set when a posterior is stored or loaded."""

    NAMES = ("a", "a_basis", "b", "b_basis", "count", "norm_sq", "n", "precision", "prior")  # Posterior.state

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            self.register_buffer(name, torch.empty(0))

    @property
    def posterior(self) -> Posterior:
        return Posterior.from_state(self._buffers)

    def store(self, posterior: Posterior):
        """Copy a posterior to the buffers, in float32 because not every device has float64."""
        state = posterior.state()
        for name in self.NAMES:
            value = state[name].float() if state[name].is_floating_point() else state[name]
            setattr(self, name, value.to(self.n.device))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in self.NAMES:
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.n.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class BayesVLM(Adaptor):
    """Embeddings as Gaussians, by a Laplace posterior on each tower's last linear layer; arXiv 2412.06014.

    `spread` (N, D) are the variances of an embedding z in `b_basis`, `uncertainty` is their sum divided by |z|^2.

    n: how often each item behind the factors counts. prior: how the prior enters, `damped` as published or `exact`.
    evidence: the marginal likelihood that the prior precision maximizes, the `correct` or the faulty `published` one.
    candidates, batches: the factors come from at most `batches` batches of `candidates` items, each item against its
    batch; no image is used twice. factors: load them from a file instead, see `_load_factors`. variance: of the cosine,
    see models/prob_cosine.py. probabilities: of classes; `probit` and `mean` are scores of pairs too; `mc-independent`
    and `mc-joint` are means over draws for classification alone, where pairs have the score of `probit`; `mc-joint`
    appends phi to the spread, (N, D + P). draws: how many. Raises ValueError for invalid values.
    """

    pooled = True

    def __init__(
        self,
        dim: int,
        n: float = 4.0,
        prior: str = "damped",
        evidence: str = "correct",
        candidates: int = 32768,
        batches: int = 10,
        factors: str = "",
        variance: str = "diagonal",
        probabilities: str = "probit",
        draws: int = 100,
    ):
        super().__init__()
        one_of("prior", prior, PRIORS)
        one_of("evidence", evidence, OBJECTIVES)
        one_of("variance", variance, VARIANCES)
        one_of("probabilities", probabilities, PROBABILITIES)
        if evidence == "published" and prior == "exact":
            raise ValueError("the published evidence is defined for the damped prior only")
        if isinstance(n, str) or not 0 < n < math.inf:
            raise ValueError(f"n must be a number above 0, not {n!r}")
        for name, value, least in (("candidates", candidates, 2), ("batches", batches, 1), ("draws", draws, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, {least} or more, not {value!r}")
        self.dim, self.n, self.prior, self.evidence = dim, n, prior, evidence
        self.candidates, self.batches, self.factors = candidates, batches, factors
        self.variance, self.probabilities, self.draws = variance, probabilities, draws
        self.image, self.text = Tower(), Tower()
        self.register_buffer("logit_scale", torch.tensor(math.nan))
        self._half_of = {}  # the last embedding of each side, and its Half

    def prepare(self, pairs, bank=None, quiet: bool = False) -> dict | None:
        """Gather or load the factors of both towers, and find the precisions that maximize the marginal likelihood.

        Returns `Pairs.seen` of the images behind the factors, or None if unknown. Raises UserError for a cache without
        pooled features and for unusable factors.
        """
        factors, seen = self.find_factors(pairs, quiet)
        self.logit_scale.fill_(pairs.meta["logit_scale"])
        self._half_of.clear()
        for side in SIDES:
            parts = (pairs.projection.get(f"{side}_{name}", 0.0) for name in ("weight", "bias"))
            norm_sq = sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)
            try:
                posterior = Posterior(factors[side], norm_sq, self.n, self.prior, objective=self.evidence)
            except ValueError as error:
                raise UserError(f"the {side} factors of {self.factors or pairs.folder}: {error}.") from None
            getattr(self, side).store(posterior)
        return seen

    def adapt_image(self, image: Tensor) -> Embedding:
        """Adapt images (N, D + P) to Gaussians."""
        return self._adapt(image, self.image)

    def adapt_text(self, text: Tensor) -> Embedding:
        """Adapt captions (M, D + P) to Gaussians."""
        return self._adapt(text, self.text)

    def similarity(self, image: Embedding, text: Embedding) -> Tensor:
        """Mean of the cosine (N, M)."""
        return mean_of(*self._halves(image, text))

    def log_likelihood(self, image: Embedding, text: Embedding) -> Tensor:
        """Logit (N, M) times the probit factor of its variance, without the logit bias, which all pairs share."""
        halves = self._halves(image, text)
        return self._factor(halves) * self.logit_scale * mean_of(*halves)

    def classify(self, image: Embedding, text: Embedding) -> Tensor:
        if not self.probabilities.startswith("mc-"):
            return self.log_likelihood(image, text)
        if self.probabilities == "mc-joint":
            draws = zip(self._sampled(image, "image"), self._sampled(text, "text"), strict=True)
            probability = joint_probabilities(draws, self.logit_scale.item())
        else:
            halves = self._halves(image, text)
            logit, variance = self.logit_scale * mean_of(*halves), self.logit_scale**2 * variance_of(*halves)
            probability = independent_probabilities(logit, variance, self.draws, seeds_of(image.mean))
        return probability.clamp_min(torch.finfo(probability.dtype).tiny).log()

    def matched_scale(self, image: Embedding, text: Embedding) -> float | None:
        """The logit scale times the mean factor over (N, C) that ProbCosine and the probit put on cosines.

        None for means over draws, which put no factor on logits.
        """
        if self.probabilities.startswith("mc-"):
            return None
        left, right = self._halves(image, text)
        shrinkage, total = right.mean.norm(dim=-1), 0.0
        for rows in torch.arange(len(left.mean), device=shrinkage.device).split(max(1, TILE // len(shrinkage))):
            block = Half(*(None if part is None else part[rows] for part in left))
            total += (block.mean.norm(dim=-1) @ (self._factor((block, right)) * shrinkage).sum(dim=-1)).item()
        return self.posterior_scale * self.logit_scale.item() * total / (len(left.mean) * len(shrinkage))

    def _adapt(self, x, tower):
        mean, phi = cut(x, self.dim)
        spread = tower.posterior.spread(phi)
        square = mean.square().sum(dim=-1).clamp_min(torch.finfo(mean.dtype).eps)  # an embedding of zeros has no length
        uncertainty = spread.sum(dim=-1) / square
        # Joint draws need phi, which the spread does not determine.
        return Embedding(mean, uncertainty, torch.cat([spread, phi], 1) if self.probabilities == "mc-joint" else spread)

    def _gaussians(self, embedding, side):
        return Gaussians(embedding.mean, embedding.spread[:, : self.dim], getattr(self, side).b_basis)

    def _halves(self, image, text):
        """The left and the right Half of ProbCosine."""
        return self._half(image, "image"), self._half(text, "text")

    def _half(self, embedding, side):
        """The Half of one side, cached because many blocks of queries share a gallery."""
        mean, cached = self._half_of.get(side, (None, None))
        if mean is not embedding.mean:
            basis = getattr(self, SIDES[side]).b_basis
            cached = half(self._gaussians(embedding, side), basis, self.variance, right=side == "text")
            self._half_of[side] = embedding.mean, cached
        return cached

    def _factor(self, halves):
        """Factor (N, M) on the logits."""
        if self.probabilities == "mean":
            images, texts = (len(side.mean) for side in halves)
            return self.logit_scale.new_ones(1, 1).expand(images, texts)
        return probit_factor(self.logit_scale**2 * variance_of(*halves))

    def _sampled(self, embedding, side):
        """Iterate over embeddings (N, D), each time under another sampled map."""
        posterior, phi = getattr(self, side).posterior, embedding.spread[:, self.dim :]
        return posterior.samples(phi, embedding.mean, torch.Generator().manual_seed(SEEDS[side]), self.draws)

    def find_factors(self, pairs, quiet: bool = False) -> tuple[dict[str, Factors | Spectrum], dict | None]:
        """Load the factors of both towers from `factors`, or gather them; also returns `Pairs.seen` of their images.

        Raises UserError as `prepare` does.
        """
        return self._load_factors(pairs) if self.factors else self._gather_factors(pairs, quiet)

    def _gather_factors(self, pairs, quiet):
        """Compute the factors of random images and a caption of each, batch by batch."""
        fed = {side: pairs.fed(side, pooled=True) for side in SIDES}
        images, texts = draw_pairs(pairs.image_of_text, self.batches * self.candidates)
        count, device = len(images), self.logit_scale.device
        scale, loss = pairs.meta["logit_scale"], loss_of(pairs.meta)
        a, b = dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES, 0.0)
        parts = max(1, math.ceil(count / self.candidates))
        bar = tqdm(total=2 * count, desc="factors", unit="item", disable=quiet or None)
        for number in range(parts):  # batches of about equal size
            chosen = {"image": images[number::parts], "text": texts[number::parts]}
            rows = {side: cut(fed[side][np.sort(chosen[side])], self.dim) for side in SIDES}
            z = {side: torch.from_numpy(embedding).to(device).float() for side, (embedding, _) in rows.items()}
            for side, other in SIDES.items():
                _, phi = rows[side]
                # Summed in float64, which not every device has.
                batch_factor = activation_factor(phi, device=device).cpu().double()
                a[side] += math.sqrt(len(phi)) * batch_factor
                for block in z[side].split(STEP):
                    b[side] += curvature(block, z[other], scale, **loss).cpu().double()
                    bar.update(len(block))
        bar.close()
        root = math.sqrt(count)
        return {side: Factors(a[side] / root, b[side] / root, count) for side in SIDES}, pairs.seen(images)

    def _load_factors(self, pairs):
        """Read factors as BayesVLM publishes them (see `load_published`), or those of a run's adaptor.pt."""
        path = Path(self.factors)
        weights = {side: pairs.projection[f"{side}_weight"].shape for side in SIDES}
        sizes = {side: (p + (f"{side}_bias" in pairs.projection), d) for side, (d, p) in weights.items()}
        if path.suffix != ".pt":
            return load_published(path, sizes=sizes), None
        saved = read_run(path)
        if saved["identity"]["encoder_fingerprint"] != pairs.meta["encoder_fingerprint"]:
            raise UserError(f"{path} has the factors of another backbone than {pairs.folder} was cached with.")
        state = saved["state_dict"]
        if not all(f"{side}.{name}" in state for side in SIDES for name in Tower.NAMES):
            raise UserError(f"{path} has no factors: it must be a run of the same method.")
        towers = {side: {name: state[f"{side}.{name}"] for name in Tower.NAMES} for side in SIDES}
        return {side: Posterior.from_state(state).spectrum for side, state in towers.items()}, saved["seen"]
