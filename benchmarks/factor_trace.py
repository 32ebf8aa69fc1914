"""How many candidates and batches BayesVLM's B factors need: `python -m benchmarks.factor_trace --dataset shapes`.

Computes B (arXiv 2412.06014, 5) of both towers from batches of K pairs, each item against the K items of the other
modality, and writes its trace per item, relative to that of the largest K with all batches, to
results/<dataset>/<backbone>/factor-trace.json, which report.py plots. Needs no pooled features.
"""

import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from datasets.embeddings import Pairs
from models.bayesvlm import SIDES, draw_pairs
from models.laplace import curvature, loss_of
from utils.arguments import add_data_flags, make_parser
from utils.config import load_config
from utils.device import pick_device
from utils.errors import UserError, exits_cleanly
from utils.files import write_json


def parse(argv):
    parser = make_parser(__doc__)
    add_data_flags(parser, "pairs of images and captions")
    parser.add_argument("--split", help="by default the training split")
    parser.add_argument("--candidates", nargs="+", type=int, metavar="K", help="by default 1/64, 1/16 and 1/4 of all")
    parser.add_argument("--batches", type=int, default=5, help="average over 1 to this many batches")
    parser.add_argument("--trials", type=int, default=5, help="repeats with different random batches")
    return parser.parse_args(argv)


def measure(pairs, candidates, batches, device):
    """Trace of B per item in each of `batches` random batches of K candidates: {side: [floats]}."""
    traces = {side: [] for side in SIDES}
    for _ in range(batches):
        rows = dict(zip(SIDES, draw_pairs(pairs.image_of_text, candidates), strict=True))
        z = {side: torch.from_numpy(getattr(pairs, side)[rows[side]]).to(device).float() for side in SIDES}
        for side, other in SIDES.items():
            b = curvature(z[side], z[other], pairs.meta["logit_scale"], **loss_of(pairs.meta))
            traces[side].append(b.trace().item() / len(z[side]))
    return traces


@exits_cleanly()
def main(argv=None):
    args = parse(argv)
    device, config = pick_device(args.device), load_config(args.dataset, backbone=args.backbone)
    pairs = Pairs(args.dataset, config.backbone, args.split or config.data.train_split)
    if pairs.classes is not None:
        raise UserError(f"{pairs.folder} has classes and no captions: name a data set of pairs.")
    items = len(pairs.image)
    sizes = sorted(set(args.candidates or [max(2, min(items, 32768) // part) for part in (64, 16, 4, 1)]))
    if not 2 <= sizes[0] <= sizes[-1] <= items:
        raise UserError(f"--candidates must be from 2 to {items:,}, the images of {pairs.folder}.")
    if args.batches < 1 or args.trials < 1:
        raise UserError(f"--batches and --trials must be 1 or more, not {args.batches} and {args.trials}.")

    traces = {side: {size: [] for size in sizes} for side in SIDES}
    bar = tqdm(total=len(sizes) * args.trials, unit="trial", desc="factors", disable=None)
    for size in sizes:
        for trial in range(args.trials):
            torch.manual_seed(trial)
            for side, values in measure(pairs, size, args.batches, device).items():
                traces[side][size].append(values)
            bar.update()
    bar.close()
    sides = {side: [] for side in SIDES}
    for side, by_size in traces.items():
        whole = statistics.fmean(value for values in by_size[sizes[-1]] for value in values)
        for size, trials in by_size.items():
            for count in range(1, args.batches + 1):
                relative = [statistics.fmean(values[:count]) / whole for values in trials]
                sides[side].append({"candidates": size, "batches": count, "relative_trace": relative})
                spread = f" ± {statistics.stdev(relative):.3f}" if len(relative) > 1 else ""
                print(f"{side:5}  K = {size:6,}  batches {count}  {statistics.fmean(relative):.3f}{spread}")
    metadata = {"dataset": args.dataset, "backbone": config.backbone, "fingerprint": pairs.meta["fingerprint"]}
    path = Path("results", args.dataset, config.backbone, "factor-trace.json")
    write_json(path, metadata | {"trials": args.trials, "items": items, "sides": sides})
    print(path)


if __name__ == "__main__":
    main()
