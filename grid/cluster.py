"""Jobs on a cluster through submitit: Slurm's, or processes of this machine that are submitted in the same way."""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import psutil
from tqdm import tqdm

from grid.workers import Workers, without_signals
from utils.config import HOME, setting
from utils.device import usable_cores
from utils.errors import UserError
from utils.files import UNREADABLE

FOLDER = Path("jobs")  # scripts, logs and results of the cluster's jobs
COMMON = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "name")  # parameters that are not Slurm's alone
SINGLE = ("nodes", "tasks_per_node", "ntasks_per_node")  # parameters that only 1 is right for
MINUTES = 240  # that a job may run; then it is requeued, three times at most
POLL = 5  # seconds
PATIENCE = 30  # seconds that jobs of this machine get to end by themselves
GONE = 3  # polls in a row in which Slurm does not know a job that has left no result
SILENT = 600  # seconds in which Slurm does not answer


class Chunk:
    """What a cluster's job calls: jobs, {name: steps}, on its devices; returns the failures, {name: sentences}.

    Requeued, it does what is left. Slurm warns a job of its time limit by SIGUSR2, on which submitit calls `checkpoint`
    and requeues it.
    """

    def __init__(self, jobs, devices, failed=None):
        self.jobs, self.devices, self.failed, self.workers = jobs, devices, failed or {}, None

    def __call__(self):
        self.workers = Workers(self.devices, log=True)
        signal.signal(signal.SIGTERM, self._terminated)
        with self.workers:
            for name, errors in self.workers.run(dict(self.jobs), lambda: None):
                print(f"{name}: {' '.join(errors) or 'done'}", flush=True)
                del self.jobs[name]
                if errors:
                    self.failed[name] = " ".join(errors)
        return self.failed

    def checkpoint(self):
        """Interrupt the jobs, and return what submitit calls after the requeue."""
        from submitit.helpers import DelayedSubmission

        if self.workers:
            self.workers.interrupt()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of the requeue
        return DelayedSubmission(Chunk(self.jobs, self.devices, self.failed))

    def _terminated(self, *_):
        """Save, and wait for the end: SIGTERM begins a preemption and a cancel, and a job cannot tell which.

        To requeue itself would undo the cancel; to end by itself would be a failure, which Slurm does not requeue.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the saving
        self.workers.interrupt()
        print("terminated: saved, waits for the end", file=sys.stderr, flush=True)
        while os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            time.sleep(1)
        raise SystemExit(128 + signal.SIGTERM)


class Cluster:
    """Runs jobs on a cluster, `size` of them in each of its own, as `Workers` does here; use in a `with` block.

    kind: slurm or local. settings: key=value, parameters of submitit. If the block ends early, the jobs are cancelled.
    """

    def __init__(self, kind, settings, devices, size):
        try:
            import submitit
        except ImportError:
            raise UserError("--cluster needs submitit: run `pip install -r requirements-extra.txt`.") from None
        parameters = {"name": "reproduce", "timeout_min": MINUTES}
        for text in settings:
            for key, value in setting(text, "--slurm", "timeout_min=60").items():
                if key in SINGLE and value != 1:
                    raise UserError(f"--slurm {text}: a job is one process that starts others: use --devices.")
                parameters[key if key in COMMON else f"slurm_{key}"] = value
        most = parameters.get("slurm_array_parallelism", usable_cores())
        if type(most) is not int or most < 1:
            raise UserError(f"--slurm array_parallelism must be a whole number, 1 or more, not {most!r}.")
        # Jobs start in the working folder, and import this suite from wherever it is.
        python = f"PYTHONPATH={shlex.quote(str(HOME))} {shlex.quote(sys.executable)}"
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit hides all GPUs from jobs of this machine
        gpus = "-u CUDA_VISIBLE_DEVICES" if seen is None else f"CUDA_VISIBLE_DEVICES={shlex.quote(seen)}"
        pythons = {"slurm_python": f"env {python}", "local_python": f"env {gpus} {python}"}
        try:
            self.executor = submitit.AutoExecutor(FOLDER, kind, **pythons)
            self.executor.update_parameters(**parameters)
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"--cluster {kind}, --slurm {' '.join(settings)}: {error}") from None
        self.slurm, self.devices, self.size = kind == "slurm", devices, size
        # A queue of its own has Slurm alone.
        self.most = None if self.slurm else most
        self.running = {}  # {job of submitit: (names, polls in which it was gone)}
        self.held = set()  # ids
        self.answered = time.monotonic()

    def __enter__(self):
        earlier = {path.name.removesuffix("_submitted.pkl") for path in FOLDER.glob("*_submitted.pkl")}
        if self.slurm:
            still, end = earlier & (self._known() or {}).keys(), "scancel"
        else:
            still, end = set(filter(_runs_here, earlier)), "kill"
        if still:
            hint = f"wait for them, or `{end} {' '.join(sorted(still))}`"
            raise UserError(f"{len(still)} jobs of an earlier command are not over in {FOLDER.absolute()}: {hint}.")
        return self

    def __exit__(self, *_):
        if not self.running:
            return
        names = [job.job_id for job in self.running]
        if self.slurm:
            over = not subprocess.run(["scancel", *names], capture_output=True).returncode
        else:
            deadline = time.monotonic() + PATIENCE
            while not (over := all(job.done() for job in self.running)) and time.monotonic() < deadline:
                for job in self.running:  # again, as a job that only starts ignores it
                    if not job.done():
                        os.kill(int(job.job_id), signal.SIGTERM)
                time.sleep(1)
        state = "cancelled" if over else "NOT cancelled and may go on"
        print(f"jobs {' '.join(names)} are {state}; logs are in {FOLDER}{os.sep}", file=sys.stderr)

    def run(self, jobs, tick):
        """Run jobs, {name: steps}: yield (name, a list of what failed, with the path of the log) as they end.

        tick: called at every look at the cluster.
        """
        names = list(jobs)
        waiting = deque(names[first : first + self.size] for first in range(0, len(names), self.size))
        while waiting or self.running:
            room = len(waiting) if self.most is None else min(self.most - len(self.running), len(waiting))
            if room:
                self._submit([waiting.popleft() for _ in range(room)], jobs)
            for job in self._ended():
                chunk, _ = self.running.pop(job)
                errors = self._errors(job, chunk)
                yield from ((name, errors.get(name, [])) for name in chunk)
            tick()
            if self.running:
                time.sleep(POLL if self.slurm else 0.2)

    def _submit(self, chunks, jobs):
        """Submit chunks, lists of names, as one array."""
        complaint = io.StringIO()
        with without_signals("SIGINT"):  # nor lose what is submitted
            try:
                with contextlib.redirect_stderr(complaint), self.executor.batch():
                    calls = [Chunk({name: jobs[name] for name in chunk}, self.devices) for chunk in chunks]
                    submitted = [self.executor.submit(call) for call in calls]
            except (RuntimeError, OSError) as error:
                hint = "change --slurm or --cells-per-job"
                raise UserError(f"the cluster refuses {len(chunks)} jobs ({error}): {hint}.") from None
            self.running |= {job: (chunk, 0) for job, chunk in zip(submitted, chunks, strict=True)}
        if self.slurm:
            ids = dict.fromkeys([submitted[0].job_id, submitted[-1].job_id])
            print(f"submitted: jobs {' to '.join(ids)}; logs are in {FOLDER}{os.sep}")

    def _ended(self):
        """List the jobs that have left a result or are gone."""
        if not self.slurm:
            return [job for job in self.running if job.done()]
        # Not by submitit's sacct: many clusters have no accounting, and submitit then waits for ever.
        known = self._known()
        for job, (chunk, gone) in self.running.items():
            absent = known is not None and job.job_id not in known
            self.running[job] = chunk, gone + 1 if absent else 0
            reason = (known or {}).get(job.job_id, "")
            if re.search("[Hh]eld|JobHold", reason) and job.job_id not in self.held:
                self.held.add(job.job_id)
                hint = f"`scontrol release {job.job_id}` or `scancel {job.job_id}`"
                tqdm.write(f"job {job.job_id} is held ({reason}) and does not start: {hint}", file=sys.stderr)
        return [job for job, (_, gone) in self.running.items() if gone >= GONE or job.paths.result_pickle.exists()]

    def _known(self):
        """One's jobs that Slurm has pending or running, {id: why it is pending}; None if it does not answer."""
        try:
            command = ["squeue", "--me", "--noheader", "--array", "--format=%i %r"]
            listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            if time.monotonic() - self.answered > SILENT:
                reason = getattr(error, "stderr", None) or error
                raise UserError(f"squeue has not answered for {SILENT // 60} minutes: {reason}") from None
            return None
        self.answered = time.monotonic()
        return {job: reason for job, _, reason in (line.strip().partition(" ") for line in listed.splitlines())}

    def _errors(self, job, chunk):
        """What failed of the names in a chunk whose job has ended: {name: sentences}."""
        log, reason = os.path.relpath(job.paths.stderr), "without a result"
        if job.paths.result_pickle.exists():
            try:
                return {name: [error, f"Log: {log}"] for name, error in job.result().items()}
            except UNREADABLE:  # submitit's error is a RuntimeError
                reason = "by an error"
        with contextlib.suppress(OSError):
            last = job.paths.stderr.read_text(errors="replace").strip().rpartition("\n")[2]
            reason += f" ({last})" if last else ""
        return {name: [f"job {job.job_id} ended {reason}. Log: {log}"] for name in chunk}


def _runs_here(job):
    """Whether a job of this machine and this folder, by its id, that of a process, has not ended."""
    command = ""
    with contextlib.suppress(psutil.Error):  # it is gone
        if job.isdecimal():  # an id of Slurm may hold "_"
            command = " ".join(psutil.Process(int(job)).cmdline())
    return "submitit.local._local" in command and str(FOLDER.absolute()) in command
