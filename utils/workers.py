"""Work spread over devices: a process for each, which runs scripts one after another without importing them anew."""

import contextlib
import importlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from multiprocessing import util
from multiprocessing.connection import wait

from tqdm import tqdm

from utils.config import HOME

START = "spawn"  # CUDA does not live through a fork
PATIENCE = 10  # seconds that a process has to end by itself


class Workers:
    """A process per device, started when there is work; use in a `with` block, which ends them all.

    A job is a list of steps (script, flags), of which the first is needed by the others.
    """

    def __init__(self, devices):
        tqdm.set_lock(threading.RLock())  # its own is a semaphore, of which Python complains after a kill
        self.workers = [_Worker(device, len(devices)) for device in devices]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.end()

    def run(self, jobs, tick):
        """Give (number of the job, one sentence for each of its steps that failed), as the jobs end.

        tick: called every second.
        """
        waiting = deque(enumerate(jobs))
        for worker in self.workers[: len(jobs)]:
            worker.give(*waiting.popleft())
        while busy := {worker.connection: worker for worker in self.workers if worker.job is not None}:
            for worker in map(busy.get, wait(list(busy), timeout=1)):
                yield worker.answer()
                if waiting:
                    worker.give(*waiting.popleft())
            tick()


class _Worker:
    """One process and the job that it has, or None."""

    def __init__(self, device, neighbors):
        self.device, self.neighbors = device, neighbors
        self.process = self.connection = self.job = None

    def give(self, number, steps):
        if self.process is None:
            self._start()
        self.job = number
        with contextlib.suppress(OSError):  # it has died: `answer` will say so
            self.connection.send(steps)

    def _start(self):
        context = multiprocessing.get_context(START)
        self.connection, theirs = context.Pipe()
        given = (theirs, self.device, self.neighbors)
        process = context.Process(target=_work, args=given)  # no daemon: caching has processes of its own
        # Inherited: Ctrl-C is for this process alone, which ends them. Blocked, not ignored, for one that comes now.
        usual = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
            self.process = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, usual)
        theirs.close()  # so that its end is the other's end of file

    def answer(self):
        """Give the number of the job that has ended, and what failed in it."""
        number, alive = self.job, False
        try:
            failures, alive = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            failures = [_cause_of_death(self.process.exitcode)]
        self.job = None
        if not alive:
            self.stop()
            self.end()
        return number, failures

    def stop(self):
        """Tell the process to end, in the middle of a job if it has one."""
        if self.process is None:
            return
        if self.job is not None:
            self.process.terminate()
        with contextlib.suppress(OSError):
            self.connection.send(None)

    def end(self):
        """Wait until the process has ended, and not for long."""
        if self.process is None:
            return
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.process = self.connection = self.job = None


def _cause_of_death(code):
    if code is None or code >= 0:
        return f"its process ended with exit code {code}."
    name = signal.Signals(-code).name
    return f"its process was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}."


def _work(connection, device, neighbors):
    """Run jobs as they come, until there are none, or something goes wrong that no script foresees."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the scripts know how to end on that
    util.Finalize(None, os._exit, (0,), exitpriority=-9)  # the last of all: to take torch down in order takes a second
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        import torch

        tqdm.set_lock(threading.RLock())
        torch.set_num_threads(max(1, torch.get_num_threads() // neighbors))
        healthy = True
        while healthy:
            failures, steps = [], connection.recv()
            if steps is None:
                break
            for number, (script, flags) in enumerate(steps):
                said, healthy = _run(script, [*flags, "--device", device])
                failures += [said] if said else []
                if not healthy or (said and number == 0):
                    break
            connection.send((failures, healthy))


def _end_with_parent():
    """End this process with the one that started it, however that ends: its heir is to find every folder free."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(script, flags):
    """Run a script's main; returns the sentence that it failed with, and whether the process is still to be trusted."""
    sys.argv[0], printed = f"{script}.py", io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            importlib.import_module(script).main(flags)
    except SystemExit as stop:
        if stop.code == 130:
            raise KeyboardInterrupt from None
        return printed.getvalue().strip().rpartition("\n")[2] if stop.code else "", True
    except Exception as error:  # of CUDA, some leave every later call failing
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(HOME))]
        place = f" ({os.path.relpath(ours[-1].filename, HOME)}, line {ours[-1].lineno})"
        return f"{script}.py: {type(error).__name__}: {' '.join(str(error).split())}{place}", False
    return "", True
