"""BayesVLM (Baumann et al., arXiv 2412.06014): uncertainty of the frozen towers' last linear maps, nothing trained.

N images, M captions, D embedding size, P size of what a last map W (D, P) is given, with a 1 at the end where it has a
bias. Its posterior is a Gaussian, so that an embedding is one, too, and so a cosine has a mean and a variance.
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
from utils.errors import UserError

SIDES = {"image": "text", "text": "image"}  # each with what its candidates are
PROBABILITIES = ("mean", "probit", "mc-independent", "mc-joint")
SEEDS = {"image": 0, "text": 1}  # of draws: whatever part of the images is asked for, the weights are the same
STEP = 2048  # items between two steps of the progress bar
TILE = 2**22  # probit factors held at once


def draw_pairs(image_of_text, most: int):
    """Rows of at most `most` random images, none twice, and of a caption of each; by torch's global generator.

    image_of_text: (M,) the image of each caption. Both are arrays in one order.
    """
    captions = np.bincount(image_of_text)
    order, starts = np.argsort(image_of_text, kind="stable"), np.cumsum(captions) - captions
    images = np.flatnonzero(captions)
    images = images[torch.randperm(len(images)).numpy()[:most]]
    which = (torch.rand(len(images), dtype=torch.float64).numpy() * captions[images]).astype(np.int64)
    return images, order[starts[images] + which]


class Tower(nn.Module):
    """The posterior of a tower's last map as buffers, whose sizes are known once there is one."""

    NAMES = ("a", "a_basis", "b", "b_basis", "count", "norm_sq", "n", "precision", "prior")  # Posterior.state

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            self.register_buffer(name, torch.empty(0))

    @property
    def posterior(self) -> Posterior:
        return Posterior.from_state(self._buffers)

    def hold(self, posterior: Posterior):
        """Take a posterior over, in float32, which every device has."""
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
    """Embeddings as Gaussians: `spread` (N, D) has their variances in `b_basis`, `uncertainty` the sum over |z|^2.

    n: how often each item behind the factors counts. prior: how the prior enters, `damped` as published or `exact`.
    evidence: which marginal likelihood the prior's precision maximizes, the `correct` one or the `published`, faulty.
    candidates, batches: of how many items the factors are gathered, each against its batch; an image is taken once, so
    that small data have fewer. factors: take them from a file instead, see `_taken`. variance: of the cosine, see
    models/prob_cosine.py. probabilities: of classes; `probit` and `mean` are scores of pairs, `mc-independent` and
    `mc-joint` means over draws, which hold for classification alone: pairs then have the score of `probit`, and with
    `mc-joint` phi stands behind the spread, (N, D + P). draws: how many. Raises ValueError for what cannot be.
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
        given = {"prior": prior, "evidence": evidence, "variance": variance, "probabilities": probabilities}
        known = {"prior": PRIORS, "evidence": OBJECTIVES, "variance": VARIANCES, "probabilities": PROBABILITIES}
        for name, value in given.items():
            if value not in known[name]:
                raise ValueError(f"{name} must be {' or '.join(known[name])}, not '{value}'")
        if evidence == "published" and prior == "exact":
            raise ValueError("the published evidence is of the damped prior only")
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
        self._held = {}

    def prepare(self, pairs, quiet: bool = False) -> dict | None:
        """Gather the factors of both towers, or take them, and find the precisions of most marginal likelihood.

        Returns which images they are of (`Pairs.seen`), None where that is not known. Raises UserError for a cache
        without pooled features, and for factors that cannot be used.
        """
        factors, seen = self.find_factors(pairs, quiet)
        self.logit_scale.fill_(pairs.meta["logit_scale"])
        self._held.clear()
        for side in SIDES:
            parts = (pairs.projection.get(f"{side}_{name}", 0.0) for name in ("weight", "bias"))
            norm_sq = sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)
            try:
                posterior = Posterior(factors[side], norm_sq, self.n, self.prior, objective=self.evidence)
            except ValueError as error:
                raise UserError(f"the {side} factors of {self.factors or pairs.folder}: {error}.") from None
            getattr(self, side).hold(posterior)
        return seen

    def adapt_image(self, image: Tensor) -> Embedding:
        """Give images (N, D + P) a Gaussian each."""
        return self._adapt(image, self.image)

    def adapt_text(self, text: Tensor) -> Embedding:
        """Give captions (M, D + P) a Gaussian each."""
        return self._adapt(text, self.text)

    def similarity(self, image: Embedding, text: Embedding) -> Tensor:
        """Mean of the cosine (N, M)."""
        return mean_of(*self._halves(image, text))

    def log_likelihood(self, image: Embedding, text: Embedding) -> Tensor:
        """Logit (N, M), times the probit factor on its variance; a logit bias, common to all, is left out."""
        halves = self._halves(image, text)
        return self._factor(halves) * self.logit_scale * mean_of(*halves)

    def classify(self, image: Embedding, text: Embedding) -> Tensor:
        if not self.probabilities.startswith("mc-"):
            return self.log_likelihood(image, text)
        if self.probabilities == "mc-joint":
            found = joint_probabilities(zip(*map(self._drawn, (image, text), SIDES)), self.logit_scale.item())
        else:
            halves = self._halves(image, text)
            logit, variance = self.logit_scale * mean_of(*halves), self.logit_scale**2 * variance_of(*halves)
            generator = torch.Generator().manual_seed(0)
            found = independent_probabilities(logit, variance, self.draws, generator)
        return found.clamp_min(torch.finfo(found.dtype).tiny).log()

    def matched_scale(self, image: Embedding, text: Embedding) -> float | None:
        """The logit scale times what ProbCosine and the probit factor multiply cosines by, on average over (N, C).

        None where probabilities are means over draws, which multiply logits by nothing.
        """
        if self.probabilities.startswith("mc-"):
            return None
        left, right = self._halves(image, text)
        shrunk, total = right.mean.norm(dim=-1), 0.0
        for rows in torch.arange(len(left.mean), device=shrunk.device).split(max(1, TILE // len(shrunk))):
            some = Half(*(None if part is None else part[rows] for part in left))
            total += (some.mean.norm(dim=-1) @ (self._factor((some, right)) * shrunk).sum(dim=-1)).item()
        return self.posterior_scale * self.logit_scale.item() * total / (len(left.mean) * len(shrunk))

    def _adapt(self, x, tower):
        mean, phi = cut(x, self.dim)
        spread = tower.posterior.spread(phi)
        square = mean.square().sum(dim=-1).clamp_min(torch.finfo(mean.dtype).eps)  # an empty embedding has no length
        uncertainty = spread.sum(dim=-1) / square
        # Joint draws need phi, of which the spread says too little.
        return Embedding(mean, uncertainty, torch.cat([spread, phi], 1) if self.probabilities == "mc-joint" else spread)

    def _gaussians(self, embedding, side):
        return Gaussians(embedding.mean, embedding.spread[:, : self.dim], getattr(self, side).b_basis)

    def _halves(self, image, text):
        """Both sides as ProbCosine takes them."""
        return self._half(image, "image"), self._half(text, "text")

    def _half(self, embedding, side):
        """One side, kept until another is asked for: a gallery is the same for many blocks of queries."""
        of, held = self._held.get(side, (None, None))
        if of is not embedding.mean:
            basis = getattr(self, SIDES[side]).b_basis
            held = half(self._gaussians(embedding, side), basis, self.variance, right=side == "text")
            self._held[side] = embedding.mean, held
        return held

    def _factor(self, halves):
        """What logits (N, M) are multiplied by."""
        if self.probabilities == "mean":
            images, texts = (len(side.mean) for side in halves)
            return self.logit_scale.new_ones(1, 1).expand(images, texts)
        return probit_factor(self.logit_scale**2 * variance_of(*halves))

    def _drawn(self, embedding, side):
        """Embeddings (N, D) under one drawn map after another."""
        posterior, phi = getattr(self, side).posterior, embedding.spread[:, self.dim :]
        return posterior.samples(phi, embedding.mean, torch.Generator().manual_seed(SEEDS[side]), self.draws)

    def find_factors(self, pairs, quiet: bool = False) -> tuple[dict[str, Factors | Spectrum], dict | None]:
        """Gather the factors of both towers, or take those that are named: also returns which images they are of.

        Raises UserError as `prepare` does.
        """
        return self._taken(pairs) if self.factors else self._gathered(pairs, quiet)

    def _gathered(self, pairs, quiet):
        """Factors of random images with a caption of each, batch by batch, and the images."""
        fed = {side: pairs.fed(side, pooled=True) for side in SIDES}
        images, texts = draw_pairs(pairs.image_of_text, self.batches * self.candidates)
        count, device = len(images), self.logit_scale.device
        scale, loss = pairs.meta["logit_scale"], loss_of(pairs.meta)
        a, b = dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES, 0.0)
        parts = max(1, -(-count // self.candidates))
        bar = tqdm(total=2 * count, desc="factors", unit="item", disable=quiet or None)
        for number in range(parts):  # batches of about one size
            chosen = {"image": images[number::parts], "text": texts[number::parts]}
            rows = {side: cut(fed[side][np.sort(chosen[side])], self.dim) for side in SIDES}
            z = {side: torch.from_numpy(embedding).to(device).float() for side, (embedding, _) in rows.items()}
            for side, other in SIDES.items():
                _, phi = rows[side]
                # Summed in float64, which not every device has.
                of_batch = activation_factor(phi, device=device).cpu().double()
                a[side] += math.sqrt(len(phi)) * of_batch
                for some in z[side].split(STEP):
                    b[side] += curvature(some, z[other], scale, **loss).cpu().double()
                    bar.update(len(some))
        bar.close()
        root = math.sqrt(count)
        return {side: Factors(a[side] / root, b[side] / root, count) for side in SIDES}, pairs.seen(images)

    def _taken(self, pairs):
        """Factors as BayesVLM publishes them (see `load_published`), or those of a run's adaptor.pt, and its images."""
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
