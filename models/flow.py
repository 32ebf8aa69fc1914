"""A density on the sphere by flow matching: an ODE carries the uniform density to that of either modality.

One velocity field serves both modalities, on geodesics from uniform points to embeddings: Riemannian flow matching
(Chen & Lipman 2024, arXiv 2302.03660) for a density of embeddings given the modality (the idea of arXiv 2601.21662).
N items, D embedding size, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Embedding
from models.clip import Clip
from models.density import SIDES, QueryOnly

WAVES = 8  # frequencies of the features of time
CONDITION = 64  # units that read them
ARCS = 256  # at least, of a modality in a step: with few pairs several arcs end at each


def geodesic(start: Tensor, end: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Points (N, D) at `time` (N,) of the shortest arcs between unit vectors (N, D), and their velocities (N, D).

    An end of zeros has no direction: its arc stays at the start.
    """
    cos = (start * end).sum(dim=-1, keepdim=True)
    aside = end - cos * start
    angle = torch.atan2(aside.norm(dim=-1, keepdim=True), cos)  # keeps its digits where acos has none
    aside, turned = F.normalize(aside, dim=-1), time[:, None] * angle
    return turned.cos() * start + turned.sin() * aside, angle * (turned.cos() * aside - turned.sin() * start)


class Velocity(nn.Module):
    """A tangent velocity field on the sphere, given time and modality, whose divergence is exact in any dimension.

    With two hidden layers and no more, the trace of the Jacobian W3 diag(b) W2 diag(a) W1 of the perceptron is
    b' (W2 * (W1 W3)') a, where a and b are slopes of the activations: it costs what the perceptron itself does.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.inner, self.middle = nn.Linear(dim, width, bias=False), nn.Linear(width, width, bias=False)
        self.outer = nn.Linear(width, dim, bias=False)
        self.sizes = (width, width, width, width, dim)  # of what time and modality set: scales, shifts, constant
        self.condition = nn.Sequential(
            nn.Linear(2 * WAVES + 2, CONDITION), nn.SiLU(), nn.Linear(CONDITION, sum(self.sizes))
        )
        nn.init.zeros_(self.outer.weight)  # training starts at the uniform density
        nn.init.zeros_(self.condition[-1].weight)
        nn.init.zeros_(self.condition[-1].bias)

    def _parts(self, x, time, modality):
        """Inputs of both activations (N, W), and the output (N, D) before it is made tangent."""
        wave = math.pi * torch.arange(1, WAVES + 1, device=x.device, dtype=x.dtype) * time[:, None]
        features = torch.cat([wave.cos(), wave.sin(), F.one_hot(modality, 2).to(x)], dim=-1)
        scale, shift, second_scale, second_shift, constant = self.condition(features).split(self.sizes, dim=-1)
        length = math.sqrt(x.shape[-1])  # a coordinate of a unit vector is about 1 / length
        first = (1 + scale) * self.inner(length * x) + shift
        second = (1 + second_scale) * self.middle(F.silu(first)) + second_shift
        output = (self.outer(F.silu(second)) + constant) / length
        return first, second, output, 1 + scale, 1 + second_scale

    def forward(self, x: Tensor, time: Tensor, modality: Tensor) -> Tensor:
        """Tangent velocities (N, D) at unit vectors (N, D); time and modality, 0 or 1: (N,) or (1,)."""
        output = self._parts(x, time, modality)[2]
        return output - (output * x).sum(dim=-1, keepdim=True) * x

    def with_divergence(self, x: Tensor, time: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`, and the divergence (N,) on the sphere: tr J - x' J x - (D - 1) x' v of the field J is that of."""
        first, second, output, scale, second_scale = self._parts(x, time, modality)
        radial = (output * x).sum(dim=-1)
        slope, second_slope = scale * silu_slope(first), second_scale * silu_slope(second)
        mixed = self.middle.weight * (self.inner.weight @ self.outer.weight).T
        trace = (F.linear(slope, mixed) * second_slope).sum(dim=-1)
        along = second_slope * self.middle(slope * self.inner(x))  # of J x, before the last layer
        inward = (along * (x @ self.outer.weight)).sum(dim=-1)
        divergence = trace - inward - (x.shape[-1] - 1) * radial
        return output - radial[:, None] * x, divergence


def silu_slope(x: Tensor) -> Tensor:
    """The derivative of SiLU, elementwise."""
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


def log_density(field: Velocity, x: Tensor, modality: int, steps: int, **options) -> Tensor:
    """Log density (N,), in nats above uniform, of unit vectors (N, D) that the field carries there from uniform ones.

    The instantaneous change of variables (Chen et al. 2018, arXiv 1806.07366) along the ODE from time 1 back to 0, by
    `steps` equal steps of Runge and Kutta's order 4. With equal steps no item depends on the others, as it would where
    their common error sets the step. options: for `torchdiffeq.odeint` in place of this method.
    """
    from torchdiffeq import odeint

    of_modality = torch.tensor([modality], device=x.device)

    def change(time, state):
        place = F.normalize(state[0], dim=-1)  # a step leaves the sphere by its error
        return field.with_divergence(place, time.reshape(1), of_modality)

    options = options or {"method": "rk4", "options": {"step_size": 1 / steps}}
    times = torch.tensor([1.0, 0.0], device=x.device, dtype=x.dtype)
    return odeint(change, (x, torch.zeros_like(x[:, 0])), times, **options)[1][-1]


class Flow(QueryOnly):
    """Uncertainty is the log density of a query given its modality, by flow matching; after arXiv 2601.21662.

    width: of the velocity field's two hidden layers. steps: of the ODE.
    """

    def __init__(self, dim: int, width: int = 512, steps: int = 16):
        super().__init__(dim)
        self.require_positive(width=(width, int), steps=(steps, int))
        self.field = Velocity(dim, width)

    def adapt_image(self, image: Tensor) -> Embedding:
        """Adapt images (N, D); without an uncertainty in training, where no loss needs the ODE."""
        return Clip.adapt_image(self, image) if self.training else super().adapt_image(image)

    def adapt_text(self, text: Tensor) -> Embedding:
        """Adapt captions (M, D), as images."""
        return Clip.adapt_text(self, text) if self.training else super().adapt_text(text)

    def uncertainty(self, query: Tensor, side: str) -> Tensor:
        return self.log_density(query, side)

    def log_density(self, query: Tensor, side: str) -> Tensor:
        """That of the flow."""
        return log_density(self.field, F.normalize(query, dim=-1), list(SIDES).index(side), self.steps)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Flow matching () of B pairs: each embedding is the end of an arc from a uniform point."""
        return self.matching(F.normalize(image, dim=-1), F.normalize(text, dim=-1))

    def auxiliary_loss(self, image: Embedding, text: Embedding, losses: tuple[Tensor, Tensor]) -> Tensor:
        """Flow matching (): no InfoNCE of cosines teaches the flow."""
        return self.matching(image.mean, text.mean)

    def matching(self, image: Tensor, text: Tensor) -> Tensor:
        """Mean squared error () of the velocities on arcs to B unit vectors of either modality; arXiv 2302.03660, (9).

        Arcs are the same at every call in evaluation, so that losses of held-out pairs compare.
        """
        times = math.ceil(ARCS / len(image))
        end = torch.cat([image.repeat(times, 1), text.repeat(times, 1)])
        generator = None if self.training else torch.Generator(end.device).manual_seed(0)
        draw = {"device": end.device, "dtype": end.dtype, "generator": generator}
        start = F.normalize(torch.randn(end.shape, **draw), dim=-1)
        modality = torch.arange(2, device=end.device).repeat_interleave(len(end) // 2)
        # A time in each of as many equal parts of [0, 1] as a modality has arcs: less noise than independent times.
        part = torch.arange(len(end), device=end.device) % (len(end) // 2)
        time = 2 * (part + torch.rand(len(end), **draw)) / len(end)
        place, velocity = geodesic(start, end, time)
        return (self.field(place, time, modality) - velocity).square().sum(dim=-1).mean()
