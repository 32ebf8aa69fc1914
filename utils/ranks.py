"""The processes of one `torchrun`: who this one is, and how they wait for one another."""

import datetime
import os

import torch.distributed as dist

from utils.errors import UserError


class Ranks:
    """This process among those that torchrun started; alone without it.

    rank: 0 .. world - 1. local: number on this machine. Ranks exchange nothing but words (gloo), at most a week apart.
    """

    def __init__(self):
        self.rank, self.world, self.local, self.neighbors = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        )
        self.first = self.rank == 0
        if self.world > 1 and not dist.is_initialized():
            # One rank may have hours of images more than another, and reads the list anew while the others wait.
            try:
                dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            except ValueError as error:
                raise UserError(
                    f"WORLD_SIZE is {self.world}, but the processes cannot find one another ({error}): start them with"
                    " torchrun, or unset it."
                ) from None

    def in_turn(self, call):
        """Call `call` on rank 0 and then on the others: whatever is wrong, rank 0 says it, once."""
        if not self.first:
            self.told(None)
        found = call()
        if self.first:
            self.told(None)
        return found

    def told(self, value):
        """Give what rank 0 gives as `value`, when every rank has come here."""
        values = [value]
        if self.world > 1:
            try:
                dist.broadcast_object_list(values)
                dist.barrier()
            except RuntimeError:  # the connection is lost, because another rank has ended: it says why
                raise SystemExit(1) from None
        return values[0]

    def close(self):
        """End the exchange; what a rank that failed leaves undone, torchrun ends."""
        if self.world > 1:
            dist.destroy_process_group()
