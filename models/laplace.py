"""Kronecker-factored Laplace approximation of a tower's last linear map: BayesVLM's posterior (arXiv 2412.06014).

N items, K candidates of the other modality, D embedding size, P size of the input phi of the map W (D, P). If the map
has a bias, phi ends in a 1 and W in the bias. An embedding is g = W phi (+ a residual that is not random). Candidates,
temperature and the other tower are fixed. Then the generalized Gauss-Newton matrix of item i is H_i (x) phi_i phi_i^T,
where H_i (D, D) is that of the embedding, and the sum over items is approximated by B (x) A.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError, one_of
from utils.files import UNREADABLE

LOSSES = ("infonce", "siglip")
PRIORS = ("damped", "exact")
OBJECTIVES = ("correct", "published")
TOWERS = {"image": "img", "text": "txt"}  # names in published files
PUBLISHED_COUNT = 327_680  # items behind published factors, ten batches of 32,768; the files do not record it


class Factors(NamedTuple):
    """Kronecker factors of the Gauss-Newton matrix of N items: B (x) A approximates sum_i H_i (x) phi_i phi_i^T."""

    a: Tensor  # (P, P) sum_i phi_i phi_i^T / sqrt(N)
    b: Tensor  # (D, D) sum_i H_i / sqrt(N)
    count: int  # N


class Spectrum(NamedTuple):
    """Eigenvalues of the factors, at least 0, and their eigenvectors in columns."""

    a: Tensor  # (P,)
    a_basis: Tensor  # (P, P)
    b: Tensor  # (D,)
    b_basis: Tensor  # (D, D)
    count: int

    @property
    def factors(self) -> Factors:
        a, b = ((basis * values) @ basis.T for values, basis in (self[:2], self[2:4]))
        return Factors(a, b, self.count)


def activation_factor(phi, device="cpu", block: int = 8192) -> Tensor:
    """Factor A (P, P) of phi (N, P), a tensor or an array that is read block by block."""
    total = 0.0
    for start in range(0, len(phi), block):
        rows = torch.as_tensor(phi[start : start + block]).to(device)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # a cache may hold half precision
        total = total + rows.T @ rows
    return total / math.sqrt(len(phi))


def curvature(
    source: Tensor, target: Tensor, scale: float, bias: float = 0.0, loss: str = "infonce", block: int = 256
) -> Tensor:
    """Sum_i H_i (D, D), the Gauss-Newton matrices of the loss of embeddings (N, D) against all candidates (K, D).

    loss: `infonce`, the cross-entropy of a softmax over the candidates; `siglip`, a sigmoid for each. Logits are scale
    times cosine plus bias. With x the direction of g, Q = I - x x^T and T the candidates' directions,
    H = w Q M Q where w = scale^2 / |g|^2 and M = T^T (diag c - c c^T) T, c the softmax. For sigmoids p, c = p (1 - p)
    for any labels, and M has no c c^T. Multiplied out, everything is products of (block, K) by (K, D): time
    O(N K D + K D^2), memory O(K (D + block) + D^2); item by item it would be K D^2 for each. In float32, if all items
    are sure of their candidate (largest c near 1), the difference of nearly equal terms is mostly rounding: a relative
    error of 2.7e-3 at scale 100 on shapes-colors. Rows of length 0 have no direction and add nothing. Raises ValueError
    for an unknown loss.
    """
    one_of("loss", loss, LOSSES)
    target = F.normalize(target, dim=-1)
    candidate_weight = target.new_zeros(len(target))  # sum_i w_i c_i
    total = target.new_zeros(target.shape[1], target.shape[1])
    for rows in source.split(block):
        length = rows.norm(dim=-1)
        weight = torch.where(length > 0, (scale / length).square(), 0.0)
        x = F.normalize(rows, dim=-1)
        cosine = x @ target.T
        logit = scale * cosine + bias
        c = logit.softmax(dim=-1) if loss == "infonce" else logit.sigmoid() * (-logit).sigmoid()
        candidate_weight += weight @ c
        if loss == "infonce":
            mean = c @ target
            along = (mean * x).sum(dim=-1)
            total -= mean.T @ (weight[:, None] * mean)
        c *= cosine
        ray = c @ target  # M x; its second term is subtracted below
        radial = (c * cosine).sum(dim=-1)  # x^T M x
        if loss == "infonce":
            ray = ray - along[:, None] * mean
            radial = radial - along.square()
        # M - x (M x)^T - (M x) x^T + (x^T M x) x x^T, the last term split between the two before it
        cross = x.T @ (weight[:, None] * (ray - radial[:, None] / 2 * x))
        total -= cross + cross.T
    total += target.T @ (candidate_weight[:, None] * target)
    return (total + total.T) / 2


def loss_of(meta: dict) -> dict:
    """Keyword arguments of `curvature` for the loss that a cached backbone was pretrained with, by its meta.json."""
    bias = meta["logit_bias"]
    return {"loss": "infonce", "bias": 0.0} if bias is None else {"loss": "siglip", "bias": bias}


def decompose(factors: Factors) -> Spectrum:
    """Eigenvalues, clamped at 0, and eigenvectors of both factors, computed in float64 and cast to the factors' type.

    Raises ValueError for factors that are not finite.
    """
    parts = []
    for factor in factors[:2]:
        if not factor.isfinite().all():
            raise ValueError("a Kronecker factor is not finite")
        double = factor.detach().cpu().double()  # not every device has float64
        values, basis = torch.linalg.eigh((double + double.T) / 2)
        parts += [part.to(factor.dtype).to(factor.device) for part in (values.clamp_min(0), basis)]
    return Spectrum(*parts, factors.count)


def best_precision(
    a: Tensor, b: Tensor, norm_sq: float, n: float, prior: str = "damped", objective: str = "correct"
) -> float:
    """The prior precision lambda that maximizes the evidence, given the factors' eigenvalues (P,), (D,) and |W|^2.

    The evidence is (D P log lambda - lambda |W|^2 - log det of the posterior precision) / 2; n, prior: see Posterior.
    objective: `published`, as in BayesVLM's code until 2025-09 (damped only), swaps the powers of the two factors'
    determinants and does not halve log det. The slope in log lambda decreases, so there is one root or none. Raises
    ValueError if there is none: nothing learned, |W| = 0, n not above 0, or, if published, an A of too low rank.
    """
    one_of("prior", prior, PRIORS)
    one_of("objective", objective, OBJECTIVES)
    if objective == "published" and prior == "exact":
        raise ValueError("the published objective is defined for the damped prior only")
    if not (n > 0 and norm_sq > 0):
        raise ValueError(f"n and |W|^2 must be above 0, not {n} and {norm_sq}")
    a, b = (values.detach().cpu().double().clamp_min(0).numpy() for values in (a, b))
    p, d = len(a), len(b)
    if prior == "exact":
        product = n * np.outer(a, b)

    def slope(log_precision: float) -> float:
        """Twice the objective's derivative in log lambda."""
        precision = math.exp(log_precision)
        if prior == "exact":
            log_det = (precision / (product + precision)).sum()
        else:
            root = math.sqrt(precision)
            slope_a, slope_b = (0.5 * (root / (math.sqrt(n) * values + root)).sum() for values in (a, b))
            log_det = d * slope_a + p * slope_b if objective == "correct" else 2 * (p * slope_a + d * slope_b)
        return p * d - precision * norm_sq - log_det

    below = math.log(p * d / norm_sq)  # beyond this the slope is negative
    while slope(below) <= 0:
        below -= 5
        if below < -600:  # exp() would underflow
            raise ValueError(
                "no prior precision maximizes the marginal likelihood: the factors are nearly zero, or the objective is"
                " the published one and the rank of A is too low for it, as with few items"
            )
    return math.exp(scipy.optimize.brentq(slope, below, below + 5, xtol=1e-12))


class Posterior:
    """Gaussian posterior of W after N items counted n times, centered at the pretrained weights.

    factors: those of the Gauss-Newton matrix, or their Spectrum, which saves the decomposition. norm_sq: |W|^2, bias
    included. prior: `damped`, precision (sqrt(n) B + sqrt(lambda) I) (x) (sqrt(n) A + sqrt(lambda) I), as published;
    `exact`, n B (x) A + lambda I. precision: lambda, or None for the one that maximizes `objective` (see
    `best_precision`).

    Both precisions are diagonal in the product of the factors' eigenbases, where the coordinates of W have `variance`
    (D, P). So the covariance of any embedding is diagonal in `basis` (D, D), the eigenvectors of B. Raises ValueError
    as `best_precision` does, and for a precision that is not above 0.
    """

    def __init__(
        self,
        factors: Factors | Spectrum,
        norm_sq: float,
        n: float = 4.0,
        prior: str = "damped",
        precision: float | None = None,
        objective: str = "correct",
    ):
        self.prior = one_of("prior", prior, PRIORS)
        self.spectrum = factors if isinstance(factors, Spectrum) else decompose(factors)
        self.norm_sq, self.n = float(norm_sq), float(n)
        a, b = self.spectrum.a, self.spectrum.b
        if precision is None:
            precision = best_precision(a, b, norm_sq, n, prior, objective)
        elif not (precision > 0 and n >= 0):
            raise ValueError(f"a prior precision must be above 0 and n at least 0, not {precision} and {n}")
        self.precision = float(precision)
        if prior == "exact":
            self.variance = 1 / (n * b[:, None] * a + precision)
        else:
            variance_a, variance_b = (1 / (math.sqrt(n) * values + math.sqrt(precision)) for values in (a, b))
            self.variance = variance_b[:, None] * variance_a

    @property
    def basis(self) -> Tensor:
        return self.spectrum.b_basis

    def spread(self, phi: Tensor) -> Tensor:
        """Variances s (N, D) in `basis` of embeddings of phi (N, P).

        Their covariance is U diag(s) U^T. Under the damped prior s is c / (sqrt(n) b + sqrt(lambda)) with one number
        c = phi^T (sqrt(n) A + sqrt(lambda) I)^-1 phi per item. Raises ValueError for a phi of another size.
        """
        return self._coordinates(phi).square() @ self.variance.T

    def samples(self, phi: Tensor, mean: Tensor, generator: torch.Generator, draws: int) -> Iterator[Tensor]:
        """Draw embeddings (N, D) with these means (N, D): all under one sampled W, then all under the next.

        phi: as in `spread`. Generators of equal seeds give the same W, so a pool and a target can share each draw.
        """
        coordinates, deviation = self._coordinates(phi), self.variance.sqrt()
        for _ in range(draws):
            noise = torch.randn(deviation.shape, generator=generator, dtype=deviation.dtype, device=generator.device)
            yield mean + coordinates @ (deviation * noise.to(deviation.device)).T @ self.basis.T

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `from_state` restores the posterior; `torch.load(weights_only=True)` reads them."""
        scalars = {"norm_sq": self.norm_sq, "n": self.n, "precision": self.precision}
        return {
            **{name: torch.as_tensor(value) for name, value in self.spectrum._asdict().items()},
            **{name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()},
            "prior": torch.tensor(PRIORS.index(self.prior)),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "Posterior":
        """Restore a posterior from its `state`."""
        spectrum = Spectrum(*(state[name] for name in Spectrum._fields))._replace(count=int(state["count"]))
        norm_sq, n, precision = (state[name].item() for name in ("norm_sq", "n", "precision"))
        return cls(spectrum, norm_sq, n, PRIORS[int(state["prior"])], precision)

    def _coordinates(self, phi: Tensor) -> Tensor:
        """Coordinates (N, P) of phi in the eigenbasis of A."""
        phi = phi.to(self.spectrum.a)  # a cache may hold half precision
        if phi.shape[-1] != len(self.spectrum.a):
            raise ValueError(f"phi has {phi.shape[-1]} coordinates, but the posterior has {len(self.spectrum.a)}")
        return phi @ self.spectrum.a_basis


def load_published(path, sizes: dict[str, tuple[int, int]] | None = None) -> dict[str, Factors]:
    """Read BayesVLM's factors by tower, from its folder of A_img_analytic.pt and so on, or an .npz of A_img, B_img, ...

    sizes: P and D that `image` and `text` must have, if given. The published prior precisions are ignored: they come
    from the faulty objective. Raises UserError for missing or damaged factors and wrong sizes.
    """
    path = Path(path)
    read = _read_archive if path.suffix == ".npz" else _read_folder
    if not path.exists():
        raise UserError(f"{path} is not there: give the folder or the .npz of BayesVLM's factors.")
    values = read(path)
    factors = {}
    for tower, short in TOWERS.items():
        a, b = (_factor(values[f"{side}_{short}"], f"{side}_{short}", path) for side in "AB")
        if sizes and sizes[tower] != (len(a), len(b)):
            raise UserError(
                f"the {tower} factors in {path} have sizes {len(a)} and {len(b)}, the {tower} tower's last map has"
                f" {' and '.join(map(str, sizes[tower]))}: they belong to another model."
            )
        factors[tower] = Factors(a, b, PUBLISHED_COUNT)
    if len(factors["image"].b) != len(factors["text"].b):
        b_sizes = " and ".join(str(len(f.b)) for f in factors.values())
        raise UserError(f"B_img and B_txt in {path} have sizes {b_sizes}: both must have the model's embedding size.")
    return factors


_NAMES = tuple(f"{side}_{short}" for short in TOWERS.values() for side in "AB")


def _read_archive(path):
    try:
        with np.load(path, allow_pickle=False) as archive:
            values = {name: torch.as_tensor(archive[name]) for name in _NAMES if name in archive.files}
    except UNREADABLE:
        raise UserError(f"{path} is damaged or not an .npz file: get it again.") from None
    for name in _NAMES:
        if name not in values:
            raise UserError(f"{path} has no {name}: BayesVLM's factors are {', '.join(_NAMES)}.")
    return values


def _read_folder(path):
    values = {}
    for name in _NAMES:
        file = path / f"{name}_analytic.pt"
        if not file.exists():
            raise UserError(f"{path} has no {file.name}: BayesVLM's factors are {', '.join(_NAMES)}, a file each.")
        try:
            # A was saved from a GPU. Tensors only: a pickle may run anything.
            values[name] = torch.load(file, map_location="cpu", weights_only=True)
        except UNREADABLE:
            raise UserError(f"{file} is damaged or contains more than a tensor: get it again.") from None
    return values


def _factor(value, name, path):
    """Symmetric factor in float32 or float64; published factors are asymmetric by about 1e-7."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[0] != value.shape[1]:
        kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{name} in {path} must be a square matrix, not {kind}.")
    if not value.is_floating_point() or not value.isfinite().all():
        raise UserError(f"{name} in {path} must contain finite floating-point numbers only.")
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return (value + value.T) / 2
