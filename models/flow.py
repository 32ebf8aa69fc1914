"""A density on the sphere by flow matching: an ODE carries the uniform density to that of either modality.

One velocity field serves both modalities, on geodesics from uniform points to embeddings: Riemannian flow matching
(Chen & Lipman 2024, arXiv 2302.03660) for a density of embeddings given the modality (the idea of arXiv 2601.21662).
N items, D embedding size, W width.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

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
    """Points (N, ..., D) at `time` (N,) of the shortest arcs between unit vectors (N, ..., D), and their velocities.

    An end of zeros has no direction: its arc stays at the start.
    """
    cos = (start * end).sum(dim=-1, keepdim=True)
    aside = end - cos * start
    angle = torch.atan2(aside.norm(dim=-1, keepdim=True), cos)  # keeps its digits where acos has none
    aside, turned = F.normalize(aside, dim=-1), time.view(-1, *[1] * (start.ndim - 1)) * angle
    return turned.cos() * start + turned.sin() * aside, angle * (turned.cos() * aside - turned.sin() * start)


class Velocity(nn.Module):
    """A tangent velocity field on S spheres at once, given time and mask, whose divergence is exact in any dimension.

    masks: for each, whether each of the S sides moves; the others are a condition, or zeros where they are unknown.

    With two hidden layers and no more, the trace of the Jacobian W3 diag(b) W2 diag(a) W1 of the perceptron is
    b' (W2 * (W1 W3)') a, where a and b are slopes of the activations: it costs what the perceptron itself does. Of a
    side's own Jacobian, W1 are the columns and W3 the rows of that side.
    """

    def __init__(self, dim: int, width: int, masks: Sequence[Sequence[bool]]):
        super().__init__()
        self.dim, self.masks = dim, masks
        whole = dim * len(masks[0])
        self.inner, self.middle = nn.Linear(whole, width, bias=False), nn.Linear(width, width, bias=False)
        self.outer = nn.Linear(width, whole, bias=False)
        self.sizes = (width, width, width, width, whole)  # of what time and mask set: scales, shifts, constant
        self.condition = nn.Sequential(
            nn.Linear(2 * WAVES + len(masks), CONDITION), nn.SiLU(), nn.Linear(CONDITION, sum(self.sizes))
        )
        nn.init.zeros_(self.outer.weight)  # training starts at the uniform density
        nn.init.zeros_(self.condition[-1].weight)
        nn.init.zeros_(self.condition[-1].bias)

    def sides(self, x: Tensor) -> Tensor:
        """Unit vectors of all sides, or what else they have, side by side (N, S D): one after the other (N, S, D)."""
        return x.unflatten(-1, (-1, self.dim))

    def _parts(self, x, time, mask):
        """Inputs of both activations (N, W), and the output (N, S D) before it is made tangent."""
        wave = math.pi * torch.arange(1, WAVES + 1, device=x.device, dtype=x.dtype) * time[:, None]
        features = torch.cat([wave.cos(), wave.sin(), F.one_hot(mask, len(self.masks)).to(x)], dim=-1)
        scale, shift, second_scale, second_shift, constant = self.condition(features).split(self.sizes, dim=-1)
        length = math.sqrt(self.dim)  # a coordinate of a unit vector is about 1 / length
        first = (1 + scale) * self.inner(length * x) + shift
        second = (1 + second_scale) * self.middle(F.silu(first)) + second_shift
        output = (self.outer(F.silu(second)) + constant) / length
        return first, second, output, 1 + scale, 1 + second_scale

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """Tangent velocities (N, S D), 0 of sides that do not move, at unit vectors (N, S D).

        time, and the numbers of masks: (N,) or (1,).
        """
        place, output = self.sides(x), self.sides(self._parts(x, time, mask)[2])
        tangent = output - (output * place).sum(dim=-1, keepdim=True) * place
        return (tangent * torch.tensor(self.masks, device=x.device)[mask, :, None]).flatten(-2)

    def with_divergence(self, x: Tensor, time: Tensor, mask: int) -> tuple[Tensor, Tensor]:
        """`forward` under one mask, and the divergence (N,) on the spheres that move.

        Of one sphere it is tr J - x' J x - (D - 1) x' v of the field J that is not yet made tangent.
        """
        of = torch.tensor([mask], device=x.device)
        first, second, output, scale, second_scale = self._parts(x, time, of)
        slope, second_slope = scale * silu_slope(first), second_scale * silu_slope(second)
        velocities, divergence = [], 0.0
        inner, outer = self.inner.weight.split(self.dim, dim=1), self.outer.weight.split(self.dim)
        parts = zip(self.masks[mask], *(rows.split(self.dim, dim=-1) for rows in (x, output)), inner, outer)
        for moves, place, velocity, columns, rows in parts:
            if not moves:
                velocities.append(torch.zeros_like(place))
                continue
            radial = (velocity * place).sum(dim=-1)
            trace = (F.linear(slope, self.middle.weight * (columns @ rows).T) * second_slope).sum(dim=-1)
            along = second_slope * self.middle(slope * F.linear(place, columns))  # of J x, before the last layer
            inward = (along * (place @ rows)).sum(dim=-1)
            divergence = divergence + trace - inward - (self.dim - 1) * radial
            velocities.append(velocity - radial[:, None] * place)
        return torch.cat(velocities, dim=-1), divergence


def silu_slope(x: Tensor) -> Tensor:
    """The derivative of SiLU, elementwise."""
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


def log_density(field: Velocity, x: Tensor, mask: int, steps: int, **options) -> Tensor:
    """Log density (N,), in nats above uniform, of unit vectors (N, S D) that the field carries there from uniform ones.

    Of the sides that move under the mask, given those that do not.

    The instantaneous change of variables (Chen et al. 2018, arXiv 1806.07366) along the ODE from time 1 back to 0, by
    `steps` equal steps of Runge and Kutta's order 4. With equal steps no item depends on the others, as it would where
    their common error sets the step. options: for `torchdiffeq.odeint` in place of this method.
    """
    from torchdiffeq import odeint

    def change(time, state):
        place = F.normalize(field.sides(state[0]), dim=-1).flatten(-2)  # a step leaves the sphere by its error
        return field.with_divergence(place, time.reshape(1), mask)

    options = options or {"method": "rk4", "options": {"step_size": 1 / steps}}
    times = torch.tensor([1.0, 0.0], device=x.device, dtype=x.dtype)
    return odeint(change, (x, torch.zeros_like(x[:, 0])), times, **options)[1][-1]


class Flow(QueryOnly):
    """Uncertainty is the log density of a query given its modality, by flow matching; after arXiv 2601.21662.

    width: of the velocity field's two hidden layers. steps: of the ODE. masks: what each number that the field is given
    means, and whether its sides move.
    """

    masks: ClassVar = dict.fromkeys(SIDES, (True,))

    def __init__(self, dim: int, width: int = 512, steps: int = 16):
        super().__init__(dim)
        self.require_positive(width=(width, int), steps=(steps, int))
        self.field = Velocity(dim, width, list(self.masks.values()))

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
        return log_density(self.field, F.normalize(query, dim=-1), list(self.masks).index(side), self.steps)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Flow matching () of B pairs: each embedding is the end of an arc from a uniform point."""
        return self.matching(F.normalize(image, dim=-1), F.normalize(text, dim=-1))

    def auxiliary_loss(self, image: Embedding, text: Embedding, losses: tuple[Tensor, Tensor]) -> Tensor:
        """Flow matching (): no InfoNCE of cosines teaches the flow."""
        return self.matching(image.mean, text.mean)

    def ends(self, image: Tensor, text: Tensor) -> list[Tensor]:
        """What the arcs of each mask end at (B, S D), and the conditions of its other sides."""
        return [image, text]

    def matching(self, image: Tensor, text: Tensor) -> Tensor:
        """Mean squared error () of the velocities on arcs to B unit vectors of either modality; arXiv 2302.03660, (9).

        Arcs are the same at every call in evaluation, so that losses of held-out pairs compare.
        """
        times, masks = math.ceil(ARCS / len(image)), self.field.masks
        end = self.field.sides(torch.cat([rows.repeat(times, 1) for rows in self.ends(image, text)]))
        generator = None if self.training else torch.Generator(end.device).manual_seed(0)
        draw = {"device": end.device, "dtype": end.dtype, "generator": generator}
        start = F.normalize(torch.randn(end.shape, **draw), dim=-1)
        arcs = len(end) // len(masks)
        mask = torch.arange(len(masks), device=end.device).repeat_interleave(arcs)
        moves = torch.tensor(masks, device=end.device)[mask, :, None]
        # A time in each of as many equal parts of [0, 1] as a mask has arcs: less noise than independent times.
        time = (torch.arange(len(end), device=end.device) % arcs + torch.rand(len(end), **draw)) / arcs
        place, velocity = geodesic(start, end, time)
        velocity = (velocity * moves).flatten(-2)
        place = place.where(moves, end).flatten(-2)
        return (self.field(place, time, mask) - velocity).square().sum(dim=-1).mean()
