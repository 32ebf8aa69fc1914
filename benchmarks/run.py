"""Speed and memory of each case beside a textbook and the machine's product: `python -m benchmarks.run [CASE ...]`.

A case is a function of a file of benchmarks/speed, which returns a measure.Case. A row has medians of calls that take
turns: ours, the textbook's, and the machine's best matrix product, from which follows how long the products alone that
the work cannot do without would take, the floor. On a CPU one row is of processor time on one thread, the other of wall
time on all. Memory is the growth of a fresh process's peak resident set during the call. Ratios hold across machines;
seconds do not. RESULTS.md records results.
"""

import argparse
import subprocess
import sys
import time

import torch

from benchmarks.measure import REPEATS, best_product, machine, medians, peak_growth, seconds
from benchmarks.speed import b_factor, density, encoding, epoch, evaluation, normalizers, pair_loss, ranks, step
from reporting.words import NONE
from utils.device import pick_device, usable_cores
from utils.errors import exits_cleanly

PIECES = (epoch, pair_loss, step, normalizers, evaluation, ranks, density, encoding, b_factor)
CASES = {name: case for piece in PIECES for name, case in piece.CASES.items()}
LONG = 4.0  # seconds; what takes longer is measured only three times, and once for memory
HEAD = "| case | clock | ours | textbook | ratio | products alone | of their speed |\n|:--|:--|--:|--:|--:|--:|--:|"


def ways(device, busy):
    """How times are measured on a device: their name, the number of threads and the clock.

    busy: whether other work makes wall time meaningless.
    """
    if device.type != "cpu":
        return [("wall", 1, time.perf_counter)]
    cores = usable_cores()
    processor = ("processor, 1 thread", 1, time.process_time)
    return [processor] if busy else [processor, (f"wall, {cores} threads", cores, time.perf_counter)]


def rows(name, case, device, busy):
    """Yield the lines of a table for one case; busy: see `ways`."""
    product, operations = best_product(device)
    for clock_name, threads, clock in ways(device, busy):
        torch.set_num_threads(threads)
        taken = seconds(case.ours, device) + seconds(case.textbook, device)
        calls = case.ours, case.textbook, product
        ours, textbook, alone = medians(calls, device, 3 if taken > LONG else REPEATS, clock)
        textbook *= case.parts
        floor = alone * case.flops / operations
        cells = [f"`{name}`", clock_name, *map(milliseconds, (ours, textbook)), f"{textbook / ours:.1f}"]
        cells += [milliseconds(floor), f"{100 * floor / ours:.0f} %"] if floor else [NONE, NONE]
        yield f"| {' | '.join(cells)} |"
        if case.note:
            yield f"|  | {case.note(ours)} |  |  |  |  |  |"
    if case.memory:
        memory = [in_fresh_process(name, which, device) for which in ("ours", "textbook")]
        cells = f"{memory[0]:,.0f} MB", f"{memory[1]:,.0f} MB", f"{memory[1] / max(1, memory[0]):.1f}"
        yield f"|  | memory | {' | '.join(cells)} |  |  |"


def milliseconds(value):
    return f"{1000 * value:,.{0 if value > 0.01 else 1}f} ms"


def in_fresh_process(name, which, device):
    """Growth of peak memory in MB over one call of a case, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.run", name, "--device", str(device), "--memory", which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(case):
    """Call both of a case, and raise AssertionError where they return different numbers."""
    result, expected = case.ours(), case.textbook()
    if result is not None:
        torch.testing.assert_close(torch.as_tensor(result), torch.as_tensor(expected), rtol=1e-3, atol=1e-3)


@exits_cleanly()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"any of {', '.join(CASES)}; by default all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--busy", action="store_true", help="processor time alone, as other work shares the cores")
    parser.add_argument("--memory", choices=["ours", "textbook"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"there is no case '{unknown.pop()}'; there is {', '.join(CASES)}")
    device = pick_device(args.device)
    if args.memory:
        print(peak_growth(getattr(CASES[args.cases[0]](device), args.memory), device))
        return
    print(f"{machine(device)}\n\n{HEAD}", flush=True)
    for name in args.cases or CASES:
        case = CASES[name](device)
        compare(case)
        for line in rows(name, case, device, args.busy):
            print(line, flush=True)
    print()
    for name in args.cases or CASES:
        print(f"- `{name}`: {' '.join(CASES[name].__doc__.split())}")


if __name__ == "__main__":
    main()
