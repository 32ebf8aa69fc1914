"""Soak: does anything grow where one process does the same work for an hour? `python -m benchmarks.soak [--minutes N]`.

A round caches a small `shapes` and trains and evaluates methods, all in this process; every fifth also draws the report
here and trains and evaluates one method by the scripts. After each round it counts what a leak would add to. The first
tenth of the rounds is a warm-up; exit code 1 if memory then grows by more than 2 %, or anything else at all. RESULTS.md
records results.
"""

import argparse
import contextlib
import gc
import io
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

import cache_embeddings
import eval as evaluation
import report
import train
from benchmarks.measure import machine
from utils.config import HOME
from utils.device import pick_device

METHODS = ["clip", "asymvlm-psd", "probvlm", "pfe", "linear", "density", "bayesvlm"]
LEAST, FULL = 4, 5  # rounds at least, and from one with report and scripts to the next
ALLOWED = 0.02  # growth of memory
SMALL = ["data.options.train_images=300", "data.options.val_images=100", "encoder.batch_size=64"]
SHORT = ["train.epochs=5"]


def work(methods, turn):
    """Do one round in the working folder, from nothing; turn: its number."""
    for folder in ("embeddings", "checkpoints", "results"):
        shutil.rmtree(folder, ignore_errors=True)
    data = ["--dataset", "shapes", "--quiet"]
    cache_embeddings.main([*data, "--device", "cpu", "--features", "pooled", "--workers", "1", "--set", *SMALL])
    for method in methods:
        run = [*data, "--device", "cpu", "--method", method]
        train.main([*run, "--set", *SHORT])
        evaluation.main([*run, "--score", "both"])
    if turn % FULL:
        return
    report.main(data)
    run = [*data, "--device", "cpu", "--method", methods[turn // FULL % len(methods)], "--tag", "script"]
    for script, more in (("train.py", ["--set", *SHORT]), ("eval.py", [])):
        subprocess.run([sys.executable, HOME / script, *run, *more], check=True, stdout=subprocess.DEVNULL)


def counts(temporary):
    """Count what this process holds, and what is left where temporary things go; temporary: the folder of TMPDIR."""
    gc.collect()
    process, segments = psutil.Process(), Path("/dev/shm")
    return {
        "MB": process.memory_info().rss / 2**20,
        "handles": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "threads": process.num_threads(),
        "processes": len(process.children(recursive=True)),
        "temporary files": sum(1 for _ in temporary.rglob("*")),
        "in /dev/shm": len(list(segments.iterdir())) if segments.is_dir() else 0,
        "unfinished files": sum(1 for _ in Path.cwd().rglob("*.part")),
    }


def compare(rounds):
    """Compare the counts of rounds: {name: (first, last, whether it grew)}.

    Memory is the median of the first and of the last third of the rounds, anything else the least and the most.
    """
    table, third = {}, max(1, len(rounds) // 3)
    for name in rounds[0]:
        values = [counted[name] for counted in rounds]
        if name == "MB":
            first, last = statistics.median(values[:third]), statistics.median(values[-third:])
            table[name] = first, last, last > first * (1 + ALLOWED)
        else:
            table[name] = values[0], max(values), max(values) > values[0]
    return table


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args(argv)
    print(machine(pick_device("cpu")), flush=True)
    before, rounds, started = Path.cwd(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        temporary, desk = Path(folder, "temporary"), Path(folder, "desk")
        temporary.mkdir()
        desk.mkdir()
        stack.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
        stack.callback(os.chdir, before)
        os.chdir(desk)
        while len(rounds) < LEAST or time.monotonic() - started < 60 * args.minutes:
            with contextlib.redirect_stdout(io.StringIO()):
                work(args.methods, len(rounds))
            rounds.append(counts(temporary))
            shown = ", ".join(f"{value:.0f} {name}" for name, value in rounds[-1].items())
            print(f"round {len(rounds)}, {(time.monotonic() - started) / 60:.1f} min: {shown}", flush=True)
    table = compare(rounds[math.ceil(len(rounds) / 10) :])
    for name, (first, last, grew) in table.items():
        print(f"{name}: {first:.1f} -> {last:.1f}{', which is growth' if grew else ''}")
    return int(any(grew for *_, grew in table.values()))


if __name__ == "__main__":
    sys.exit(main())
