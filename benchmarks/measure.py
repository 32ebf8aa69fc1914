"""What the benchmarks share: the machine, interleaved medians, the machine's own best matrix product, memory."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from tasks.made_with import made_with

REPEATS = 5
# Rows, inner size and columns of the products of which the fastest is the machine's best, on a CPU and elsewhere.
PRODUCTS = {"cpu": [(1024, 512, 4096), (2048, 512, 2048), (2048, 1024, 1024)], "": [(8192, 1024, 8192), (8192,) * 3]}


class Case(NamedTuple):
    """Work that a benchmark measures, and the same work as a textbook has it."""

    ours: Callable  # what both return must be equal; None is not compared
    textbook: Callable
    flops: float = 0.0  # operations of the matrix products that the work cannot do without
    parts: int = 1  # the textbook does one of so many equal parts: its time is extrapolated
    memory: bool = False  # whether memory is measured, too
    note: Callable | None = None  # from the seconds of ours to a sentence


def machine(device):
    """Say what is measured on: processor or GPU, versions and commit."""
    made = made_with(device)
    name, commit = made["device"], made["commit"]
    if device.type == "cpu":
        name = f"{processor()}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{library} {version}" for library, version in sorted(made["versions"].items()))
    changed = "" if made["clean"] in (True, None) else ", with changes"
    return f"{name}; {versions}; commit {commit[:7] if commit else 'unknown'}{changed}"


def processor():
    """The processor's name, as Linux knows it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def synchronize(device):
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(call, device, clock=time.perf_counter):
    """Seconds that a call takes; clock: time.process_time counts those of the processor."""
    synchronize(device)
    started = clock()
    call()
    synchronize(device)
    return clock() - started


def medians(calls, device, repeats=REPEATS, clock=time.perf_counter):
    """Median seconds of each of several calls, which take turns, so that other work on the machine slows all alike."""
    times = [[seconds(call, device, clock) for call in calls] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def best_product(device, dtype=torch.float32):
    """The machine's fastest matrix product of PRODUCTS: a call, and the number of its operations."""
    products = []
    for rows, inner, columns in PRODUCTS["cpu" if device.type == "cpu" else ""]:
        left, right = (torch.randn(size, device=device).to(dtype) for size in ((rows, inner), (columns, inner)))
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        products.append((lambda a=left, b=right, c=out: torch.mm(a, b.T, out=c), 2.0 * rows * inner * columns))
    for call, _ in products:
        call()
    times = medians([call for call, _ in products], device, 3)
    return max(zip(times, products, strict=True), key=lambda timed: timed[1][1] / timed[0])[1]


def resident(field):
    """Memory of this process in MB; field: VmRSS (now) or VmHWM (peak). A child inherits the peak of getrusage."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # macOS
        if field == "VmRSS":
            return psutil.Process().memory_info().rss / 2**20
        import resource  # here, as Windows has none

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def peak_growth(call, device):
    """Growth of peak memory in MB over a call: of a GPU's, or of a process that has done nothing like it before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    call()
    return max(0.0, resident("VmHWM") - before)
