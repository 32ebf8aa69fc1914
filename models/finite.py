"""Where NaN or infinity enters a training step: by operation, parameter and pair."""

import math
import os
import sys

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from utils.config import HOME


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether tensors hold neither NaN nor infinity; waits for the device once."""
    # The norm, one pass over all of them, is finite unless a number is not, or its square overflows.
    norm = torch.nn.utils.get_total_norm(tensors)
    return bool(norm.isfinite()) or all(map(_finite, tensors))


def first_fault(adaptor, objective, image: Tensor, text: Tensor) -> tuple[str, Tensor]:
    """Repeat a step's loss of B pairs (B, D), (B, D) and name what in it is not finite, and the pairs (k,) of that.

    adaptor, and torch's generators, must be as they were before the step. The text is empty if loss and gradients are
    finite.
    """
    image, text = (x.detach().clone().requires_grad_() for x in (image, text))
    adaptor.zero_grad()
    with _Watch(len(text)) as watch:
        loss = objective(image, text)
    if not _finite(loss):
        return f"the loss is {loss.item()}{watch.place}", watch.pairs
    loss.backward()
    wrong = [name for name, p in adaptor.named_parameters() if not _finite(p.grad)]
    pairs = ~(_finite_rows(image.grad) & _finite_rows(text.grad))
    more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
    return f"the loss is {loss.item():.4g}, but the gradient of {wrong[0]}{more} is not finite" if wrong else "", pairs


class _Watch(TorchFunctionMode):
    """Notes the first operation that makes NaN or infinity of finite numbers, and for which of the `count` pairs."""

    def __init__(self, count):
        super().__init__()
        self.count, self.place, self.pairs = count, "", torch.zeros(count, dtype=torch.bool)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        finite = not self.place and _finite((args, kwargs))  # before it, as it may overwrite them
        output = func(*args, **kwargs or {})
        if finite and not _finite(output):
            frame = sys._getframe(1)
            while frame.f_back and not frame.f_code.co_filename.startswith(str(HOME / "models")):
                frame = frame.f_back
            file = os.path.relpath(frame.f_code.co_filename, HOME)
            where = f"{file}, line {frame.f_lineno} ({frame.f_code.co_name})"
            self.place = f", first by {getattr(func, '__name__', func)} in {where}"
            if isinstance(output, Tensor) and output.ndim and len(output) == self.count:
                self.pairs = ~_finite_rows(output)
        return output


def _finite(value):
    """Whether a tensor, a number or a nest of them is finite; what is no number is."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _finite_rows(value):
    """Which rows (N,) of a tensor (N, ...) are finite; all of them of None."""
    return torch.tensor(True) if value is None else value.isfinite().reshape(len(value), -1).all(dim=1).cpu()
