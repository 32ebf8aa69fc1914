"""Active learning: which images to label so that a model does well on a target; accuracy, NLL and ECE by budget.

    python active_learning.py --dataset shapes-colors --pool train shifted-train --target shifted-test \\
        --val shifted-val --strategies all --budgets 10 25 50 100 --seeds 0 1 2 3 4

Needs caches made with --features pooled. A strategy chooses images from the pool and may look at the target's images,
but at no label. The image projection alone is then trained on the labels paid for, anew from its pretrained weights for
every budget, and evaluated on the target. Each seed offers another part of the pool, so even deterministic strategies
vary with it. Writes one file per seed and strategy, with an .npz beside it, to
results/<dataset>/<backbone>/active/<target>/; existing results are not made again.
"""

import utils.interrupt  # noqa: F401

# isort: split
import math

from labeling import STRATEGIES
from utils.arguments import add_data_flags, make_parser
from utils.config import load_config
from utils.errors import GOES_ON, UserError, exits_cleanly, one_of

# Flags that are not settings of a result, or stand elsewhere in it.
NO_SETTINGS = ("dataset", "backbone", "device", "seeds", "strategies", "tag", "overwrite", "quiet")
COUNTS = ("k", "epig_pool", "epig_targets", "epig_weight", "epochs", "batch_size", "patience")
FACTORS = (
    "data of the posterior: pool (its images against the classes), a data set of captions (its training split), the"
    " adaptor.pt of a bayesvlm run, or a folder or .npz of published factors"
)


@exits_cleanly()
def parse(argv=None):
    """The flags, and the Config of the data set that they name."""
    strategies = (f"  {name:26}{sentence}" for name, sentence in STRATEGIES.items())
    parser = make_parser("\n".join([__doc__, "strategies (what each chooses from the pool):", *strategies]))
    add_data_flags(parser, "a set of images with classes")
    add = parser.add_argument
    add("--pool", nargs="+", required=True, metavar="SPLIT", help="splits whose images may be labeled")
    add("--target", required=True, metavar="SPLIT", help="evaluated on; strategies may look at its images")
    add("--val", metavar="SPLIT", help="labeled images that pick the epoch; without it the last epoch is kept")
    share = (
        "share of every budget spent on random images of --val (0.2 if no number is given); without it --val is free"
    )
    add("--val-counts", type=float, nargs="?", const=0.2, metavar="SHARE", help=share)
    add("--strategies", nargs="+", default=["all"], metavar="NAME", help=f"all, or any of {', '.join(STRATEGIES)}")
    add("--budgets", nargs="+", type=int, default=[10, 25, 50, 100], metavar="LABELS", help="numbers of labels")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="SEED", help="seeds of all random draws")
    reference = (
        "reference: as BayesVLM's code, independent draws, uncorrected EPIG, its A updated by one number; published:"
        " the old name of reference"
    )
    add("--preset", choices=["default", "reference", "published"], default="default", help=reference)
    add("--pool-share", type=float, default=0.5, help="share of the pool that each seed offers")
    add("--k", type=int, default=1, help="images of the pool taken for each chosen target image")
    near = "similarity that finds the pool images of a chosen target image"
    add("--similarity", choices=["wasserstein", "cosine"], default="wasserstein", help=near)
    add("--factors", default="pool", help=FACTORS)
    add(
        "--n",
        type=float,
        default=10.0,
        help="how often each item counts; BayesVLM's code has 10, the method bayesvlm 4",
    )
    add("--draws", type=int, default=100, help="posterior samples for bald and epig")
    add("--epig-pool", type=int, default=500, help="images nearest to targets that epig considers")
    add("--epig-targets", type=int, default=200, help="target images drawn anew for each of epig's picks")
    add("--epig-weight", type=int, default=10, help="number of items that a pick counts as in epig's posterior")
    rate = "learning rate of AdamW on the projection; the paper has 1e-5 for large models"
    add("--lr", type=float, default=3e-4, help=rate)
    add("--weight-decay", type=float, default=5e-2, help="weight decay of AdamW")
    add("--epochs", type=int, default=100, help="most epochs")
    add("--batch-size", type=int, default=30, help="labeled images per step")
    add("--patience", type=int, default=20, help="epochs without a better loss on --val before training stops")
    add("--tag", default="", help="a name that keeps these results apart from others on the same target")
    add("--overwrite", action="store_true", help="replace results made with other flags")
    add("--quiet", action="store_true", help="print nothing but where the results lie")
    args = parser.parse_args(argv)
    tidy(args)
    check(args)
    return args, load_config(args.dataset, backbone=args.backbone, tag=args.tag)


def tidy(args):
    """Put the flags in order: `all` spelled out, lists sorted, nothing twice."""
    args.strategies = list(STRATEGIES) if "all" in args.strategies else list(dict.fromkeys(args.strategies))
    args.budgets, args.seeds = sorted(set(args.budgets)), list(dict.fromkeys(args.seeds))


def check(args):
    """Raise a UserError for flags that are out of range or contradict one another."""
    for name in args.strategies:
        one_of("--strategies", name, ["all", *STRATEGIES], UserError)
    least = {"budgets": (args.budgets[0], 1), "seeds": (min(args.seeds), 0), "draws": (args.draws, 2)}
    for name, (value, limit) in (least | {name: (getattr(args, name), 1) for name in COUNTS}).items():
        if value < limit:
            raise UserError(f"--{name.replace('_', '-')} must be {limit} or more, not {value}.")
    if not all(0 < value < math.inf for value in (args.n, args.lr)) or not 0 <= args.weight_decay < math.inf:
        raise UserError("--n and --lr must be above 0, and --weight-decay must not be below 0.")
    if not 0 < args.pool_share <= 1:
        raise UserError(f"--pool-share must be above 0 and at most 1, not {args.pool_share}.")
    if args.val_counts is not None and not (args.val and 0 < args.val_counts < 1):
        raise UserError("--val-counts needs --val, and must be a share between 0 and 1.")


if __name__ == "__main__":
    parse()  # --help and wrong flags end here, before the seconds in which torch loads

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from labeling import strategies
from labeling.classifier import Classifier, fine_tune, judged
from labeling.posterior import make_posterior
from labeling.splits import Splits, image_map
from metrics import summary
from models.laplace import loss_of
from models.precision import set_precision
from reporting.curves import curves_text
from reporting.runs import Result
from tasks.classification import class_embeddings
from tasks.made_with import made_with
from utils import result_file
from utils.device import pick_device
from utils.files import locked, must_write, read_json


class Labels(NamedTuple):
    """How the labels of the budgets are spent."""

    pool: list[int]  # for images of the pool, by budget
    val: list[int] | None  # for images of --val, by budget; None: all of them are free
    offered: int  # images of the pool that each seed offers


def spend(args, splits):
    """Split the budgets between pool and --val; raises UserError where either has too few images."""
    offered, pool, val = round(args.pool_share * len(splits.pool.label)), args.budgets, None
    if args.val_counts is not None:
        val = [max(1, round(args.val_counts * budget)) for budget in args.budgets]
        pool = [budget - count for budget, count in zip(args.budgets, val, strict=True)]
    if pool[-1] > offered:
        share = f" (--pool-share {args.pool_share} of {len(splits.pool.label):,})"
        raise UserError(
            f"--budgets {args.budgets[-1]:,} is more than the {offered:,} images that the pool offers{share}."
        )
    if pool[0] < 1:
        raise UserError(
            f"--val-counts {args.val_counts} of --budgets {args.budgets[0]:,} leaves no label for the pool."
        )
    if val and val[-1] > len(splits.val.label):
        raise UserError(
            f"--val-counts {args.val_counts} of --budgets {args.budgets[-1]:,} is more than the"
            f" {len(splits.val.label):,} images of '{args.val}'."
        )
    return Labels(pool, val, offered)


def pretrained(pairs, device):
    """The zero-shot classifier, and the loss of pretraining as models/laplace.py names it."""
    classes = torch.from_numpy(class_embeddings(pairs)).to(device).float()
    return Classifier(image_map(pairs, device), classes, pairs.meta["logit_scale"]).to(device), loss_of(pairs.meta)


def results_folder(args, backbone, preset):
    """The folder of the results on a target with one preset."""
    name = "+".join(filter(None, [args.target, "" if preset == "default" else preset, args.tag]))
    return Path("results", args.dataset, backbone, "active", name)


def say_new_name(folder, old):
    """Print that --preset published has become reference, and where its results go and were."""
    rest = f", those in {old} stay as they are" if old.is_dir() else ""
    print(f"--preset published is called reference now, as in train.py: results go to {folder}{rest}.", file=sys.stderr)


def is_done(path, metadata, overwrite):
    """Whether a complete result exists; raises UserError, unless it may be replaced, if it has other metadata."""
    try:
        _, changed = result_file.compare(path, metadata)
    except (FileNotFoundError, ValueError):
        return False
    if changed and not overwrite:
        raise UserError(
            f"{path} was made with another {', '.join(changed)}: give these results a name of their own with --tag"
            " NAME, or replace those with --overwrite."
        )
    return not changed and result_file.has_arrays(path)


@exits_cleanly(interrupted=GOES_ON)
def main(argv=None):
    args, config = parse(argv)
    has_old_name = args.preset == "published"
    if has_old_name:
        args.preset = "reference"
    device = pick_device(args.device)
    set_precision(device)
    folder = results_folder(args, config.backbone, args.preset)
    must_write(folder)
    if has_old_name:
        say_new_name(folder, results_folder(args, config.backbone, "published"))
    splits = Splits(args.dataset, config.backbone, args.pool, args.target, args.val, device)
    labels = spend(args, splits)
    classifier, loss = pretrained(splits.of_target, device)
    try:
        before = judged(classifier, splits.target)
    except FloatingPointError as error:
        raise UserError(f"{error} on {splits.of_target.folder} before training: cache it again.") from None
    posterior, source = make_posterior(splits, classifier, loss, args.factors, args.n, args.quiet)
    metadata = {
        "dataset": args.dataset, "backbone": config.backbone,
        "settings": {name: value for name, value in vars(args).items() if name not in NO_SETTINGS},
        "fingerprint": {split: pairs.meta["fingerprint"] for split, pairs in splits.pairs.items()} | source,
    }  # fmt: skip

    with locked(folder):
        cells = itertools.product(args.seeds, args.strategies)
        paths = {(seed, strategy): folder / f"{strategy}-seed{seed}.json" for seed, strategy in cells}
        left = [cell for cell, path in paths.items() if not is_done(path, metadata, args.overwrite)]
        steps = labels.pool[-1] + len(args.budgets)
        bar = tqdm(total=steps * len(paths), initial=steps * (len(paths) - len(left)), unit="step",
                   desc="active learning", smoothing=0, disable=args.quiet or None)  # fmt: skip
        for seed, strategy in left:
            bar.set_postfix_str(f"seed {seed}, {strategy}")
            try:
                result, arrays = run(args, seed, strategy, splits, labels, classifier, before, posterior, loss, bar)
            except FloatingPointError as error:
                raise UserError(f"{strategy}, seed {seed}: {error} on the target; try --lr with less.") from None
            made = {"made_with": made_with(device)}
            result_file.write(paths[seed, strategy], metadata | made | result, arrays)
        bar.close()
    if not args.quiet:
        arrays = {cell: Result(path, {}).arrays for cell, path in paths.items()}
        print(curves_text({cell: read_json(path) for cell, path in paths.items()}, arrays))
    print(folder)


def run(args, seed, strategy, splits, labels, classifier, before, posterior, loss, bar):
    """Choose images by one strategy, then train and evaluate for every budget: the figures, and arrays per image.

    before: `judged` of the classifier on the target.
    """
    start, device = bar.n, splits.target.label.device
    # The same for every strategy of a seed, so that they compare: what is on offer, what is held out, and the order in
    # which fine-tuning sees its images.
    generator = torch.Generator().manual_seed(seed)
    offer = torch.randperm(len(splits.pool.label), generator=generator)[: labels.offered].sort().values.to(device)
    held_out = torch.randperm(0 if splits.val is None else len(splits.val.label), generator=generator)
    choice = strategies.Choice(
        splits.pool.rows(offer), splits.target, classifier, posterior, loss, labels.pool[-1], generator,
        args.similarity, args.k, args.draws, args.preset == "reference", args.epig_pool, args.epig_targets,
        args.epig_weight, bar.update,
    )  # fmt: skip
    chosen = offer[strategies.STRATEGIES[strategy](choice)]
    bar.update(start + labels.pool[-1] - bar.n)
    after, curve = [], []
    for i, (budget, count) in enumerate(zip(args.budgets, labels.pool, strict=True)):
        val = splits.val if labels.val is None else splits.val.rows(held_out[: labels.val[i]].to(device))
        model, epoch = fine_tune(classifier, splits.pool.rows(chosen[:count]), val, args, seed)
        after.append(judged(model, splits.target))
        point = {"budget": budget, "labels": count, "val_labels": 0 if val is None else len(val.label), "epoch": epoch}
        curve.append(point | summary.of_learner(after[-1]))
        bar.update()
    rows = chosen.cpu().numpy()
    result = {
        "seed": seed, "strategy": strategy, "classes": len(classifier.classes),
        "images": len(splits.target.label), "offered": labels.offered,
        "prior_precision": posterior.precision,
        "chosen_split": splits.split_of[rows].tolist(), "chosen_id": splits.id_of[rows].tolist(),
        "before": summary.of_learner(before), "curve": curve,
    }  # fmt: skip
    arrays = {f"before_{name}": values for name, values in before._asdict().items()}
    return result, arrays | {name: np.stack([getattr(part, name) for part in after]) for name in before._fields}


if __name__ == "__main__":
    main()
