"""Jobs spread over devices: one process each, which runs scripts one after another and imports them only once."""

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

START = "spawn"  # CUDA does not survive a fork
PATIENCE = 10  # seconds that a process gets to end by itself


class Workers:
    """One process per device, started when there is work; use in a `with` block, which ends them all.

    A job is a list of steps (script, flags); if the first fails, the others are skipped.
    """

    def __init__(self, devices):
        tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore, which Python reports as leaked after a kill
        self.workers = [_Worker(device, len(devices)) for device in devices]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.end()

    def run(self, jobs, tick):
        """Yield (number of the job, one sentence for each of its steps that failed) as the jobs end.

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
    """One process and the number of its current job, or None."""

    def __init__(self, device, neighbors):
        self.device, self.neighbors = device, neighbors
        self.process = self.connection = self.job = None

    def give(self, number, steps):
        if self.process is None:
            self._start()
        self.job = number
        with contextlib.suppress(OSError):  # it has died, which `answer` reports
            self.connection.send(steps)

    def _start(self):
        context = multiprocessing.get_context(START)
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self.device, self.neighbors)
        process = context.Process(target=_work, args=arguments)  # not a daemon: caching starts processes, too
        # The child inherits the mask: only this process handles Ctrl-C, and ends the others. The signal is blocked, not
        # ignored, so that a Ctrl-C at this moment is handled afterwards. Windows has no masks.
        mask = getattr(signal, "pthread_sigmask", lambda *_: None)
        previous = mask(getattr(signal, "SIG_BLOCK", None), {signal.SIGINT})
        try:
            process.start()
            self.process = process
        finally:
            mask(getattr(signal, "SIG_SETMASK", None), previous)
        theirs.close()  # so that reading ends when the child does

    def answer(self):
        """Return the number of the job that has ended, and a list of its failures."""
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
        """Tell the process to end, even in the middle of a job."""
        if self.process is None:
            return
        if self.job is not None:
            self.process.terminate()
        with contextlib.suppress(OSError):
            self.connection.send(None)

    def end(self):
        """Wait for the process to end, and kill it after PATIENCE seconds."""
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
    """Run jobs as they come, until there are no more or a script fails with an unexpected exception."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # on which scripts end cleanly
    util.Finalize(None, os._exit, (0,), exitpriority=-9)  # runs last, and skips a second of teardown in torch
    end_with_parent()
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
                failure, healthy = _run(script, [*flags, "--device", device])
                failures += [failure] if failure else []
                if not healthy or (failure and number == 0):
                    break
            connection.send((failures, healthy))


def end_with_parent(*_):
    """Let this process end when its parent ends in any way, so that the next run finds every folder unlocked."""

    def wait_and_end():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def _run(script, flags):
    """Run a script's main; returns its failure, a sentence or "", and whether the process can take further jobs."""
    sys.argv[0], printed = f"{script}.py", io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            importlib.import_module(script).main(flags)
    except SystemExit as stop:
        if stop.code == 130:
            raise KeyboardInterrupt from None
        return printed.getvalue().strip().rpartition("\n")[2] if stop.code else "", True
    except Exception as error:  # after some errors of CUDA every later call fails
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(HOME))]
        place = f" ({os.path.relpath(ours[-1].filename, HOME)}, line {ours[-1].lineno})"
        return f"{script}.py: {type(error).__name__}: {' '.join(str(error).split())}{place}", False
    return "", True
