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
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from multiprocessing import util

from tqdm import tqdm

from utils.config import HOME
from utils.interrupt import end_with_parent

START = "spawn"  # CUDA does not survive a fork
PATIENCE = 10  # seconds that a process gets to end by itself
INTERRUPTED = 130  # exit code


class Workers:
    """One process per device, started when there is work; use in a `with` block, which ends them all.

    A job is a list of steps (script, flags); if the first fails, the others are skipped. log: print what scripts print,
    and tracebacks.
    """

    def __init__(self, devices, log=False):
        tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore, which Python reports as leaked after a kill
        # Killed pools leave semaphores. Python's tracker removes them; its other process would count them on stderr.
        sys.warnoptions.append("ignore:resource_tracker")
        self.workers = [_Worker(device, len(devices), log) for device in devices]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.interrupt()
        for worker in self.workers:
            worker.end()

    def run(self, jobs, tick):
        """Run jobs, {name: steps}: yield (name, one sentence for each step that failed) as they end.

        tick: called every second.
        """
        waiting = deque(jobs.items())
        for worker in self.workers[: len(jobs)]:
            worker.give(*waiting.popleft())
        while busy := {worker.future: worker for worker in self.workers if worker.future}:
            for worker in map(busy.get, wait(busy, timeout=1, return_when="FIRST_COMPLETED").done):
                yield worker.answer()
                if waiting:
                    worker.give(*waiting.popleft())
            tick()

    def interrupt(self):
        """Interrupt the jobs, which save what they can, and wait for it; may be called by a signal's handler."""
        started = [worker for worker in self.workers if worker.process and worker.future]
        busy = [worker.process for worker in started if not worker.future.done()]
        for process in busy:
            process.terminate()
        for process in busy:
            process.join(PATIENCE)


class _Worker:
    """A pool of one process, so that its death breaks no other's; the name and the future of its job, or None."""

    def __init__(self, device, neighbors, log):
        self.device, self.neighbors, self.log = device, neighbors, log
        self.pool = self.process = self.name = self.future = None

    def give(self, name, steps):
        with without_signals("SIGINT", "SIGUSR1", "SIGUSR2"):  # by the last two Slurm warns every process of a job
            if self.pool is None:
                context = multiprocessing.get_context(START)
                self.pool = ProcessPoolExecutor(1, context, _prepare, (self.neighbors,))
            others = multiprocessing.active_children()
            self.name, self.future = name, self.pool.submit(_work, steps, self.device, self.log)
            if self.process is None:
                [self.process] = set(multiprocessing.active_children()) - set(others)

    def answer(self):
        """Return the name of the job that has ended, and a list of its failures."""
        try:
            failures, healthy = self.future.result()
        except BrokenExecutor:
            self.pool.shutdown()  # its thread waits for the process; of two that wait, one can miss the exit code
            failures, healthy = [_cause_of_death(self.process.exitcode)], False
        self.future = None
        if not healthy:
            self.end()
        return self.name, failures

    def end(self):
        """End the process, by a kill after PATIENCE seconds."""
        if self.pool is None:
            return
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.process is not None:
            self.process.join(PATIENCE)
            self.process.kill()
        self.pool = self.process = self.future = None


@contextlib.contextmanager
def without_signals(*names):
    """Let processes that start in the block not hear signals, such as Ctrl-C: this process does, and ends them.

    They inherit the mask. Windows has no masks. A signal in the block is handled after it: what this thread blocks can
    reach another one, and Python would call the handler here at once.
    """
    mask = getattr(signal, "pthread_sigmask", lambda *_: None)
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers, caught = {number: signal.getsignal(number) for number in numbers}, []
    with contextlib.ExitStack() as stack:  # whose steps are all taken, even if a handler raises in one
        stack.callback(lambda: [signal.raise_signal(number) for number in dict.fromkeys(caught)])
        for number, handler in handlers.items():
            if handler not in (None, signal.SIG_IGN):
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, _: caught.append(number))
        previous = mask(getattr(signal, "SIG_BLOCK", None), numbers)
        stack.callback(mask, getattr(signal, "SIG_SETMASK", None), previous)
        yield


def _cause_of_death(code):
    if code is None or code >= 0:
        return f"its process ended with exit code {code}."
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"  # of real time: no name
    return f"its process was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}."


def _prepare(neighbors):
    """Prepare this process for jobs."""
    util.Finalize(None, os._exit, (0,), exitpriority=-9)  # runs last, and skips a second of teardown in torch
    end_with_parent()
    import torch

    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(max(1, torch.get_num_threads() // neighbors))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # without a job


def _work(steps, device, log):
    """Run the steps of a job; returns its failures, and whether the process can take further jobs."""
    failures = []
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # on which scripts end cleanly
        for number, (script, flags) in enumerate(steps):
            failure, healthy = _run(script, [*flags, "--device", device], log)
            failures += [failure] if failure else []
            if not healthy or (failure and number == 0):
                break
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    return failures, healthy


def _run(script, flags, log):
    """Run a script's main; returns its failure, a sentence or "", and whether the process can take further jobs."""
    sys.argv[0], printed = f"{script}.py", io.StringIO()
    try:
        with contextlib.redirect_stdout(sys.stdout if log else io.StringIO()), contextlib.redirect_stderr(printed):
            importlib.import_module(script).main(flags)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            raise KeyboardInterrupt from None
        return printed.getvalue().strip().rpartition("\n")[2] if stop.code else "", True
    except Exception as error:  # after some errors of CUDA every later call fails
        if log:
            traceback.print_exc()
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(HOME))]
        place = f" ({os.path.relpath(ours[-1].filename, HOME)}, line {ours[-1].lineno})"
        return f"{script}.py: {type(error).__name__}: {' '.join(str(error).split())}{place}", False
    finally:
        if log:
            print(printed.getvalue(), end="", file=sys.stderr, flush=True)
            sys.stdout.flush()
    return "", True
