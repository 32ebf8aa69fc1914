"""The processes of one `torchrun`: the rank of this one, and how they exchange values and wait for each other."""

import datetime
import os

import torch.distributed as dist

from utils.errors import UserError


class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without torchrun.

    rank: 0 .. world - 1. local, neighbors: rank and number of processes on this machine. Only small Python objects are
    exchanged, by gloo.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.neighbors = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.first = self.rank == 0
        if self.world > 1 and not dist.is_initialized():
            # A rank may list or encode images for hours while the others wait for it.
            try:
                dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            except ValueError as error:
                raise UserError(
                    f"WORLD_SIZE is {self.world}, but the processes cannot find each other ({error}): start them with"
                    " torchrun, or unset it."
                ) from None

    def in_turn(self, call):
        """Return `call()`, called on rank 0 first and then on the others, so that rank 0 alone reports an error."""
        if not self.first:
            self.broadcast(None)
        result = call()
        if self.first:
            self.broadcast(None)
        return result

    def broadcast(self, value):
        """Broadcast: return rank 0's `value` on every rank, once all ranks have called this."""
        values = [value]
        if self.world > 1:
            try:
                dist.broadcast_object_list(values)
                dist.barrier()
            except RuntimeError:  # the connection is lost because another rank failed, which reports why
                raise SystemExit(1) from None
        return values[0]

    def close(self):
        """Leave the process group. If a rank has failed, torchrun ends the others."""
        if self.world > 1:
            dist.destroy_process_group()
