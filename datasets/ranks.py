"""The processes of one `torchrun`: the rank of this one, and how they exchange values and wait for each other."""

import datetime
import functools
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from utils.errors import UserError

NOTICE, MEETING = 10, 600  # seconds until a process says that it waits for the others to start, and gives up
WAIT = 12 * 3600  # seconds for another to list or encode its share


def reported(main):
    """Decorate a script's `main`: torchrun's report, which comes last, then holds the sentence of a UserError.

    torchrun reads it from the file TORCHELASTIC_ERROR_FILE; its own traceback, of itself, cannot be left out.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except UserError as error:
            if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                Path(file).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
            raise

    return wrapped


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
        self.group = None
        if self.world > 1:
            waiting = f"waiting for {self.world} processes, as WORLD_SIZE says"
            notice = threading.Timer(NOTICE, print, [waiting], {"file": sys.stderr})
            notice.start()
            try:
                dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=MEETING))
                self.group = dist.new_group(timeout=datetime.timedelta(seconds=WAIT))
            except (ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200].rstrip(".")
                raise UserError(
                    f"WORLD_SIZE is {self.world}, but the processes cannot find each other ({reason}): start them with"
                    " torchrun, or unset it."
                ) from None
            finally:
                notice.cancel()

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
        values, started = [value], time.monotonic()
        if self.world > 1:
            try:
                dist.broadcast_object_list(values, group=self.group)
                dist.barrier(group=self.group)
            except RuntimeError:
                if time.monotonic() - started < WAIT:  # the connection is lost: another rank failed, which reports why
                    raise SystemExit(1) from None
                hint = "see what they do, and run the same command again, which goes on from the finished blocks"
                raise UserError(
                    f"process {self.rank} of {self.world} has waited {WAIT // 3600} hours for the others: {hint}."
                ) from None
        return values[0]

    def close(self):
        """Leave the process group. If a rank has failed, torchrun ends the others."""
        if self.world > 1:
            dist.destroy_process_group()
