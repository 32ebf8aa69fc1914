"""The processes of one `torchrun`: the rank of this one, and how they exchange values and wait for each other."""

import datetime
import functools
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from models.shares import ENDED, Lost, Share
from utils.errors import UserError

NOTICE, MEETING = 10, 600  # seconds until a process says that it waits for the others to start, and gives up
WAIT = 12 * 3600  # seconds for another to list or encode its share, or to do what one alone does
STEP = 20  # seconds for another to reach the same place of a training step; torchrun waits 30 more for one that hangs


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


def _number(name, default, allowed):
    """Read an environment variable of torchrun; raises UserError unless it is one of a range of numbers."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) not in allowed:
        limits = f"from {allowed[0]} to {allowed[-1]:,}" if len(allowed) > 1 else f"{allowed[0]}"
        raise UserError(f"{name} must be {limits}, not '{text:.40}': start with torchrun, or unset it.")
    return int(text)


class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without torchrun.

    rank: 0 .. world - 1. local, neighbors: rank and number of processes on this machine. Small Python objects are
    exchanged by gloo, tensors by a `share`. As a context manager: of the processes that an error reaches, the first
    alone reports it, and if one ends without a report, as by a kill, another says so.
    """

    def __init__(self):
        self.world = _number("WORLD_SIZE", 1, range(1, 2**31))
        self.rank = _number("RANK", 0, range(self.world))
        self.neighbors = _number("LOCAL_WORLD_SIZE", 1, range(1, self.world + 1))
        # Some launchers name no count for a machine, or no count at all.
        self.local = _number("LOCAL_RANK", 0, range(self.neighbors if "LOCAL_WORLD_SIZE" in os.environ else 2**16))
        self.first = self.rank == 0
        self.group = self.steps = self.store = None
        if self.world > 1:
            waiting = f"waiting for {self.world} processes, as WORLD_SIZE says"
            notice = threading.Timer(NOTICE, print, [waiting], {"file": sys.stderr})
            notice.start()
            try:
                limits = [datetime.timedelta(seconds=seconds) for seconds in (MEETING, WAIT, STEP)]
                store, *_ = next(dist.rendezvous("env://", timeout=limits[0]))
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store keeps what the last one wrote
                self.store = dist.PrefixStore(attempt, store)
                options = {"store": dist.PrefixStore("group", self.store), "timeout": limits[0]}
                dist.init_process_group("gloo", rank=self.rank, world_size=self.world, **options)
                self.group, self.steps = (dist.new_group(timeout=limit) for limit in limits[1:])
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
        values = [value]
        if self.world > 1:
            self._exchange(dist.broadcast_object_list, values)
        return values[0]

    def gather(self, value):
        """Return the list of every rank's `value` on every rank."""
        values = [value] * self.world
        if self.world > 1:
            self._exchange(dist.all_gather_object, values, value)
        return values

    def _exchange(self, operation, *values):
        started = time.monotonic()
        try:
            operation(*values, group=self.group)
            dist.barrier(group=self.group)
        except RuntimeError:
            if time.monotonic() - started < WAIT:  # the connection is lost: another rank failed, which reports why
                raise Lost(ENDED) from None
            hint = "see what they do, and run the same command again, which goes on from the finished blocks"
            raise UserError(
                f"process {self.rank} of {self.world} has waited {WAIT // 3600} hours for the others: {hint}."
            ) from None

    def from_first(self, call):
        """Return on every rank what `call()` returns on rank 0, which alone calls it."""
        return self.broadcast(call() if self.first else None)

    def any(self, flag):
        """Whether `flag` is true on any rank."""
        if self.world == 1:
            return flag
        share = Share(self.rank, self.world, self.steps, STEP)
        return bool(share.sum(torch.tensor(float(flag)))[0])

    def must_agree(self, value, what):
        """Raise UserError, which says `what` differs, unless the value is that of rank 0."""
        if self.broadcast(value) != value:
            raise UserError(
                f"process {self.rank} of {self.world} has {what} than the first: give all the same files and version."
            )

    def share(self, device):
        """Return the Share of training steps on `device`: by NCCL if each has a GPU of its own, else by gloo."""
        if self.world == 1:
            return Share()
        self.broadcast(None)  # they read their data for longer than a step may last
        cuda = device.type == "cuda" and torch.cuda.device_count() >= self.neighbors and dist.is_nccl_available()
        if self.any(not cuda):
            return Share(self.rank, self.world, self.steps, STEP, staged=device.type != "cpu")
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl", timeout=datetime.timedelta(seconds=STEP))
        return Share(self.rank, self.world, group, STEP)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.world == 1:
            return
        if error is None:
            dist.destroy_process_group()
        elif not self._reports():
            raise SystemExit(130 if kind is KeyboardInterrupt else 1) from None
        elif kind is Lost:
            raise UserError(
                f"another of the {self.world} processes {error.reason}; the same command goes on from what was last"
                " saved."
            ) from None

    def _reports(self):
        """Whether this process is the first that asks, and so reports an error."""
        try:
            return self.store.add("reported", 1) == 1
        except RuntimeError:  # the process that has the store is lost
            return self.local == 0
