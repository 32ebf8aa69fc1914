"""Cost against work, with the arithmetic floor: `python -m benchmarks.cost --figure docs/cost.png`.

Three panels: the pair loss over the batch, ranks over the gallery, a training step over the perceptrons' width, each
beside the textbook. The floor is the time of the matrix products alone at the speed of the machine's best one, measured
in the same loop. On a CPU: processor time on one thread.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.measure import Case, best_product, machine, medians
from benchmarks.speed.pair_loss import info_nce
from benchmarks.speed.step import step
from metrics import retrieval
from utils.device import pick_device
from utils.errors import UserError, exits_cleanly

QUERIES, DIM, REPEATS = 256, 512, 3
SIZES = {"batch": (256, 512, 1024, 2048, 4096), "gallery": (1000, 4000, 16_000, 64_000, 256_000)}
SIZES["width"] = (128, 256, 512, 1024, 2048)
TITLES = {
    "batch": "Power spherical InfoNCE,\nwith gradients; pairs",
    "gallery": "Ranks, margin, entropy of 256\nqueries; items of the gallery",
    "width": "A training step, 2,048 pairs;\nwidth of the perceptron",
}


def ranks(device, gallery):
    """Ranks of 256 queries among so many items, D = 512, against `topk` of one matrix."""
    generator = torch.Generator().manual_seed(0)
    query, item = (F.normalize(torch.randn(n, DIM, generator=generator), dim=-1).to(device) for n in (QUERIES, gallery))
    right = np.arange(QUERIES)
    return Case(
        lambda: retrieval.rank(lambda rows: query[rows] @ item.T, gallery, right, right),
        lambda: (query @ item.T).topk(10, dim=1),
        flops=2.0 * QUERIES * gallery * DIM,
    )


WORK = {
    "batch": lambda device, size: info_nce(device, "power spherical", size),
    "gallery": ranks,
    "width": lambda device, size: step(device, "asymvlm-psd", width=size),
}


def measure(device, sizes):
    """Seconds of ours, of the textbook and of the floor: {axis: (S, 3)}; sizes: {axis: (S,)}."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    product, operations = best_product(device)
    costs = {}
    with tqdm(total=sum(map(len, sizes.values())), desc="cost", leave=False, disable=None) as bar:
        for axis, of_axis in sizes.items():
            costs[axis] = []
            for size in of_axis:
                case = WORK[axis](device, size)
                case.ours(), case.textbook()
                ours, textbook, alone = medians((case.ours, case.textbook, product), device, REPEATS, clock)
                costs[axis].append((ours, textbook, alone * case.flops / operations))
                bar.update()
    return {axis: np.array(rows) for axis, rows in costs.items()}


def plot(costs, sizes, path):
    """Draw a panel for each axis, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (axis, rows) in zip(figure.subplots(1, len(costs)), costs.items()):
        for label, marker, dash, color, values in zip(
            ("textbook", "this suite", "matrix products alone"),
            ("s", "o", None),
            ("--", "-", ":"),
            ("#d55e00", "#0072b2", "#6e7781"),
            (rows[:, 1], rows[:, 0], rows[:, 2]),
        ):
            axes.plot(sizes[axis], 1000 * values, marker=marker, linestyle=dash, color=color, label=label, markersize=4)
        axes.set(xscale="log", yscale="log", title=TITLES[axis], xticks=sizes[axis])
        axes.set_xticks(
            sizes[axis],
            labels=[f"{size:,}" if size < 10_000 else f"{size // 1000}k" for size in sizes[axis]],
            fontsize=8,
        )
        axes.minorticks_off()
        axes.title.set_fontsize(9)
        axes.grid(axis="y", color="#dfe3e8")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("ms")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


@exits_cleanly()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="where to draw")
    parser.add_argument("--points", type=int, default=5, help="sizes of each axis, the smallest ones")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if args.points < 1:
        raise UserError(f"--points must be at least 1, not {args.points}.")
    device = pick_device(args.device)
    torch.set_num_threads(1)
    sizes = {axis: of_axis[: args.points] for axis, of_axis in SIZES.items()}
    costs = measure(device, sizes)
    print(f"{machine(device)}\n\n| work | ours | textbook | products alone |\n|:--|--:|--:|--:|")
    for axis, rows in costs.items():
        for size, row in zip(sizes[axis], 1000 * rows):
            print(f"| {axis} {size:,} | {' | '.join(f'{value:,.1f} ms' for value in row)} |")
    if args.figure:
        plot(costs, sizes, args.figure)


if __name__ == "__main__":
    main()
