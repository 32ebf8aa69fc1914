"""A training step shared by several processes, each its rows of the batch; loss and gradients are those of one process.

Every process holds the whole batch and runs the method's loss. What costs most in it is computed for a share of the
rows: perceptrons and scores without a closed form, whose results are gathered, and the losses of `models/pair_loss.py`.
Everything else is computed by each process alike, random numbers included. So these rules hold, which suffice for the
gradients of any loss:

- Values are whole: every process has the same.
- Gradients are parts: that of a tensor is the sum over the processes. The loss starts them as 1 / world.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor

ENDED = "has ended: torchrun's report says how, and -9 may mean that memory was full"
_current = None  # the Share by which this process computes a loss


def current_share() -> "Share | None":
    """The Share by which this process computes a loss; None where it computes alone."""
    return _current


class Lost(SystemExit):
    """Another process has ended or does not answer; without a handler, this one ends silently, with exit code 1."""

    def __init__(self, reason: str):
        super().__init__(1)
        self.reason = reason


class Share:
    """The rows of process `rank` of `world`, and what it exchanges with the others.

    group: of torch.distributed. limit: seconds that an exchange may take, as its group has it. staged: whether tensors
    of a device are exchanged through the CPU. Its methods raise Lost.
    """

    def __init__(self, rank: int = 0, world: int = 1, group=None, limit: float = 0, staged: bool = False):
        self.rank, self.world, self.group, self.limit, self.staged = rank, world, group, limit, staged

    def of(self, objective):
        """Return the function of pairs (B, D), (B, D) that shares the loss () of `objective`; call it in training."""
        if self.world == 1:
            return objective

        def shared(image, text):
            global _current
            _current = self
            try:
                return _Part.apply(objective(image, text), self.world)
            finally:
                _current = None

        return shared

    def rows(self, count: int) -> slice:
        """Return which of `count` rows are this process's; the last processes may have fewer, or none."""
        height = -(-count // self.world)
        return slice(min(self.rank * height, count), min((self.rank + 1) * height, count))

    def gather(self, part: Tensor, count: int) -> Tensor:
        """Return all rows (count, ...) of a tensor from this process's (n, ...); differentiable."""
        return _Gather.apply(part, count, self)

    def stack(self, x: Tensor) -> Tensor:
        """Return the tensors of all processes (world, ...), which have the shape of `x`."""
        mine = self._sent(x)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        self._exchange(dist.all_gather, parts, mine)
        return torch.stack(parts).to(x.device)

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Return the sums of tensors of one type over the processes, by one exchange."""
        if self.world == 1:
            return list(tensors)
        flat = self._sent(torch.cat([x.reshape(-1) for x in tensors]))
        self._exchange(dist.all_reduce, flat)
        parts = flat.to(tensors[0].device).split([x.numel() for x in tensors])
        return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """Replace the gradients of parameters, which are parts, by their sums."""
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if self.world > 1 and grads:
            for grad, total in zip(grads, self.sum(*grads), strict=True):
                grad.copy_(total)

    def align(self, model: torch.nn.Module) -> None:
        """Give a model the parameters and buffers of the first process, as machines may round a start differently."""
        for tensor in model.state_dict().values() if self.world > 1 else ():
            sent = self._sent(tensor)
            self._exchange(dist.broadcast, sent, 0)
            tensor.copy_(sent)

    def _sent(self, x):
        """A contiguous copy of a tensor where its group can send it, which an exchange may overwrite."""
        return x.detach().to("cpu" if self.staged else x.device, memory_format=torch.contiguous_format, copy=True)

    def _exchange(self, operation, *tensors):
        started = time.monotonic()
        try:
            operation(*tensors, group=self.group)
        except RuntimeError:
            late = time.monotonic() - started >= self.limit
            raise Lost(f"has not answered for {self.limit:.0f} s" if late else ENDED) from None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, count, share):
        ctx.share = share
        padded = part.new_zeros(-(-count // share.world), *part.shape[1:])
        padded[: len(part)] = part
        return share.stack(padded).flatten(0, 1)[:count]

    @staticmethod
    def backward(ctx, grad):
        (total,) = ctx.share.sum(grad)
        return total[ctx.share.rows(len(grad))], None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, world):
        ctx.world = world
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.world, None
