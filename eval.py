"""Evaluate a trained adaptor: retrieval or classification, and how well its uncertainty tells right answers from wrong.

    python eval.py --dataset coco --method asymvlm-psd --seed 0 --uncer_levels 10
    python eval.py --dataset cifar10 --train-dataset coco --method asymvlm-psd --seed 0
    python eval.py --dataset shapes-objects --train-dataset shapes --method bayesvlm --split shifted-test --val val
    python eval.py --dataset hierarcaps --train-dataset coco --method asymvlm-psd --seed 0 --task hierarchy
    torchrun --nproc-per-node 4 eval.py --dataset coco --method asymvlm-psd --seed 0

Pairs are retrieved in both directions; images with classes are classified zero-shot by prompts; chains of prompts show
whether uncertainty falls from general to specific; the tasks of docs/decisions.md say which pairs match, which answers
to show, and whether there is one. --val adds a temperature fitted on another split's labels. Writes
results/<trained on>/<backbone>/<variant>/seed<k>/<evaluated on>-<task>.json, and beside it an .npz of the figures per
query.
"""

import utils.interrupt  # noqa: F401

# isort: split
import os
from pathlib import Path

from reporting.runs import DECISIONS, OF_EVAL  # modules of tasks/
from utils.arguments import add_data_flags, add_run_flags, check_share, make_parser, run_config
from utils.config import FOLLOWED, HUBS, LEVELS, SCORES, evaluated_as, load_config, make_adaptor, needs_pooled
from utils.errors import UserError, exits_cleanly

INTERRUPTED = "interrupted."
if os.environ.get("WORLD_SIZE", "1") != "1":
    INTERRUPTED = "interrupted, as by torchrun where another of the processes has ended: its report says which."
FEW_LEVELS, ALPHAS = 5, (0.05, 0.1, 0.2)  # of decisions
FLAGS = {"prior": ("matching",), "alpha": ("conformal",), "by": ("conformal",), "absent": ("unanswerable",),
         "predictors": ("correctness",)}  # fmt: skip


@exits_cleanly()
def parse(argv=None):
    """The flags, the Config of the run that they name, and the Data that it is evaluated on."""
    parser = make_parser(__doc__)
    add_data_flags(parser, "evaluated on")
    add_run_flags(parser)
    parser.add_argument("--train-dataset", help="trained on; by default what is evaluated on")
    parser.add_argument("--split", help="evaluated on; by default the data set's evaluation split")
    parser.add_argument("--allow-leakage", action="store_true", help="evaluate on images that were trained on")
    which = "which score ranks; by default the method's choice, which comes first with both"
    parser.add_argument("--score", choices=[*SCORES, "both"], help=which)
    task = "by default classification where images have classes, else retrieval; retrieval includes chains of prompts"
    parser.add_argument("--task", choices=OF_EVAL, help=task)
    correct = "correct scores for gallery items that are near any query, retrieval; auto takes the kind, or none, that"
    correct += " cross-validation of the training queries of the run prefers; by default the method's choice"
    parser.add_argument("--hubs", choices=HUBS, help=correct)
    unlabelled = (
        "classification: correct scores by the images of this split, without their labels; see docs/evaluation.md"
    )
    parser.add_argument("--bank", metavar="SPLIT", help=unlabelled)
    levels = f"levels of uncertainty of equal size; by default {LEVELS}, or as many as there are queries"
    parser.add_argument("--uncer_levels", "--uncer-levels", type=int, help=levels)
    by = "uncertainty that orders images into levels: their own, their best answer's or the sum; default: the first"
    parser.add_argument("--levels_by", "--levels-by", choices=FOLLOWED, help=by)
    drop = "make all levels the same size and drop the most uncertain queries left over, as the public AsymVLM code"
    parser.add_argument("--drop_remainder", "--drop-remainder", action="store_true", help=drop)
    val = "classification: fit one more temperature on all labeled images of this split of the same classes; decisions:"
    val += " learn from its labels, by default from each half of the evaluated images for the other"
    parser.add_argument("--val", metavar="SPLIT", help=val)
    prior = "matching: share of matches among the pairs to judge; by default that of the evaluated ones"
    parser.add_argument("--prior", type=float, help=prior)
    alpha = "conformal: shares of queries whose set may lack the right answer; by default 0.05 0.1 0.2"
    parser.add_argument("--alpha", type=float, nargs="+", help=alpha)
    by = "conformal: a column of a CSV or TSV, with a column `image`, by whose values the images have sets of their own"
    parser.add_argument("--by", metavar="FILE:COLUMN", help=by)
    absent = "unanswerable: a file of captions, a line each, of what no image shows; the backbone encodes them"
    parser.add_argument("--absent", metavar="FILE", type=Path, help=absent)
    predictors = "correctness: names of predictors, such as vilu or 'vilu, official'; by default all"
    parser.add_argument("--predictors", metavar="NAME", nargs="+", help=predictors)
    parser.add_argument("--quiet", action="store_true", help="print nothing but where the result lies")
    args = parser.parse_args(argv)
    config = run_config(args, args.train_dataset or args.dataset)
    return args, config, load_config(args.dataset, backbone=config.backbone).data


if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    parse()  # --help and wrong flags end here, before the seconds in which torch loads

import csv
import dataclasses
import importlib

import numpy as np
import torch

from datasets.bank import Bank
from datasets.embeddings import Pairs
from datasets.folds import fold_of
from datasets.ranks import Ranks, reported
from metrics import hubs, score_tiles
from models.precision import set_deterministic, set_precision
from reporting import evaluations
from reporting.terminal import result_text
from tasks import Absent, Choices
from tasks.made_with import made_with
from utils import result_file
from utils.checkpoint import Run
from utils.device import pick_device
from utils.files import locked, must_write, write_text


def open_val(args, pairs, run, task, identity):
    """Open the split of --val; raises UserError unless it has the classes of `pairs`, and images that nothing else has.

    identity: what the run was trained on.
    """
    if pairs.classes is None and task not in DECISIONS:
        raise UserError(
            f"{pairs.folder} has captions and no classes: leave out --val, which fits a temperature for classes."
        )
    val = Pairs(args.dataset, run.config.backbone, args.val, needs_pooled(run.config))
    val.must_fit(identity, run.folder)
    shared = pairs.shared_with(val.seen(slice(None)))
    if shared:
        raise UserError(
            f"--val {args.val} shares {shared:,} images with {pairs.folder}, on which the adaptor is evaluated: name"
            " another split."
        )
    trained = val.shared_with(run.seen)
    if trained and not args.allow_leakage:
        raise UserError(
            f"--val {args.val} has {trained:,} images that were trained on: name another split, or use them anyway with"
            " --allow-leakage."
        )
    if val.classes != pairs.classes:
        raise UserError(f"{val.folder} has other classes than {pairs.folder}: name another --val.")
    return val


def choose_hubs(args, run, pairs, val, task, identity, refit):
    """Choose the hub correction: the kind, the Correction of each direction, and the bank; None for both without one.

    val: the opened split of --val, or None. identity: what the run was trained on. refit: of its adaptor. Raises
    UserError where there is no bank, or it has an image that is evaluated or teaches.
    """
    if args.bank and task != "classification":
        raise UserError(f"--bank corrects classification: leave it out of --task {task}.")
    retrieves = task == "retrieval" or (task in DECISIONS and pairs.classes is None)
    kind = args.hubs or ("nnn" if args.bank else run.config.hubs if retrieves else "none")
    if kind == "none":
        return kind, None, None
    if task in DECISIONS and not retrieves:
        raise UserError(f"--hubs corrects no classes for --task {task}: leave it out.")
    if task == "classification":
        return kind, {"image_to_class": hubs.fixed(kind)}, open_bank(args, run, pairs, identity)
    if task == "hierarchy":
        raise UserError(f"--hubs {kind} corrects retrieval and classification: leave it out of --task hierarchy.")
    if run.bank is None:
        raise UserError(
            f"{run.folder} keeps no training queries, as it was trained by an earlier version: train again with"
            " --overwrite, or leave out --hubs."
        )
    bank = Bank(**run.bank)
    for flag, split in (("--split", pairs), ("--val", val)):
        shared = 0 if split is None else split.shared_with(bank.seen)
        if shared:
            raise UserError(
                f"{shared:,} of the {len(split.image):,} images of {split.folder} are among the training queries of"
                f" {run.folder}, from which --hubs learns: name another {flag}, or use --hubs none."
            )
    dim = pairs.dim  # pooled features may follow
    frozen = bank.image[:, :dim], bank.text[:, :dim], bank.image_of_text
    chosen = hubs.choose(*frozen, pairs.meta["logit_scale"], run.config.seed, refit)
    return kind, hubs.decide(chosen, kind), bank


def open_bank(args, run, pairs, identity):
    """Open the split of --bank; raises UserError unless it has images that the evaluated split lacks."""
    if not args.bank:
        raise UserError("--hubs corrects classification by images without labels: name a split of them with --bank.")
    bank = Pairs(args.dataset, run.config.backbone, args.bank, needs_pooled(run.config))
    bank.must_fit(identity, run.folder)
    shared = pairs.shared_with(bank.seen(slice(None)))
    if shared:
        raise UserError(f"--bank {args.bank} shares {shared:,} images with {pairs.folder}: name another split.")
    return bank


def check(args, run, pairs, task, count):
    """Raise a UserError unless the split can be evaluated as the flags ask.

    run: loaded. pairs: the opened split. count: of uncertainty levels.
    """
    has_classes = pairs.classes is not None
    if task not in DECISIONS and (task == "classification") != has_classes:
        content = "classes and no captions" if has_classes else "captions and no classes"
        raise UserError(f"{pairs.folder} has {content}: --task {task} does not apply to it.")
    if task == "hierarchy" and (args.score or args.levels_by or args.drop_remainder or args.uncer_levels is not None):
        raise UserError(
            "--task hierarchy has neither scores nor levels: leave out --score, --levels_by, --drop_remainder and"
            " --uncer_levels."
        )
    for flag, tasks in FLAGS.items():
        if getattr(args, flag) is not None and task not in tasks:
            raise UserError(f"--{flag} is for --task {' or '.join(tasks)}: leave it out of --task {task}.")
    for alpha in args.alpha or ():
        check_share("--alpha", alpha)
    if args.prior is not None:
        check_share("--prior", args.prior)
    for flag in ("uncer_levels", "levels_by", "drop_remainder"):
        has_none = task in DECISIONS and (task != "conformal" or flag == "drop_remainder")
        if has_none and getattr(args, flag) not in (None, False):
            raise UserError(f"--task {task} would not follow --{flag}: leave it out.")
    if task in DECISIONS and args.score == "both":
        raise UserError(f"--task {task} judges one score: name it with --score.")
    seen = pairs.shared_with(run.seen)
    if seen and not args.allow_leakage:
        raise UserError(
            f"{run.folder} was trained on {seen:,} of the {len(pairs.image):,} images of {args.dataset}"
            f" '{pairs.split}': name another --split or --train-dataset, or evaluate on them with"
            " --allow-leakage, which the result records."
        )
    if has_classes and len(pairs.classes) < 2:
        raise UserError(f"{pairs.folder} has only one class, '{pairs.classes[0]}': classification needs at least two.")
    if pairs.queries < 2:
        raise UserError(f"{pairs.folder} has a single query, and an evaluation needs two: cache a larger split.")
    if task == "retrieval" and not np.bincount(pairs.image_of_text, minlength=len(pairs.image)).all():
        raise UserError(f"{pairs.folder} is damaged, as it has images without a caption: delete it and cache it again.")
    if not 2 <= count <= pairs.queries:
        raise UserError(f"--uncer_levels must lie between 2 and {pairs.queries:,}, the number of queries, not {count}.")


def column_of(place):
    """A function from Pairs to the user's group (N,) of each image; place: FILE:COLUMN.

    Raises UserError if the file, the column or an image is missing.
    """
    file, _, column = place.rpartition(":")
    if not file:
        raise UserError(f"--by {place} names no column: name FILE:COLUMN.")
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t" if file.endswith((".tsv", ".tab")) else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--by {place}: {file} cannot be read ({error}): name FILE:COLUMN.") from None
    if not rows:
        raise UserError(f"{file} has no row: --by needs one for each image.")
    for name in ("image", column):
        if rows[0].get(name) is None:
            raise UserError(f"{file} has no column '{name}': --by needs FILE:COLUMN, and a column `image` in the file.")
    groups = {row["image"]: row[column] for row in rows}

    def of(pairs):
        try:
            return np.array([groups[image] for image in pairs.items["image"]])
        except KeyError as error:
            raise UserError(
                f"{file} has no row for the image {error} of {pairs.folder}: add one, with a '{column}'."
            ) from None

    return of


def open_absent(path, config, identity, folder, pooled, device):
    """Read and encode the captions of --absent; identity: what the run of `folder` was trained on."""
    from uncertainty import encode, open_backbone  # only here a backbone is needed

    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--absent {path} cannot be read ({error}): name a text file, a caption in each line."
        ) from None
    text = [line for line in lines if line]
    if len(text) < 2:
        raise UserError(f"--absent {path} has {len(text)} captions, and two are the least: add some, a line each.")
    backbone = open_backbone(config, identity, folder, device)
    parts = [encode("text", text[start : start + 64], backbone, pooled).half() for start in range(0, len(text), 64)]
    return Absent(text, torch.cat(parts).cpu().numpy())


def repeated(pairs):
    """How many captions also stand with another image, word for word: no search tells which of these is meant."""
    if pairs.classes is not None:
        return 0
    owners = {}
    for caption, owner in zip(pairs.items["text"], pairs.image_of_text.tolist(), strict=True):
        owners.setdefault(caption, set()).add(owner)
    return sum(len(owners[caption]) > 1 for caption in pairs.items["text"])


def evaluate(args, config, data, ranks):
    """Evaluate the run of a Config, as one of the processes `ranks`, of which the first writes and prints."""
    run = Run(config)
    device = pick_device(args.device, ranks.local)
    set_precision(device)
    split = args.split or data.eval_split
    pairs = Pairs(args.dataset, run.config.backbone, split, needs_pooled(run.config))
    untrained = pairs.classes is not None and not run.done and args.train_dataset is None
    if untrained and make_adaptor(run.config, pairs.dim).needs_pairs:
        raise UserError(
            f"{args.dataset} has images with classes, on which nothing is trained: name what the adaptor was trained on"
            " with --train-dataset."
        )
    adaptor, config, identity = run.load(device)
    weights = run.weights_hash()  # of what was loaded: another process may train again meanwhile
    set_deterministic(config.train.deterministic)
    pairs.must_fit(identity, run.folder)
    task = args.task or ("retrieval" if pairs.classes is None else "classification")
    usual = FEW_LEVELS if task in DECISIONS else LEVELS
    count = min(usual, pairs.queries) if args.uncer_levels is None else args.uncer_levels
    check(args, run, pairs, task, count)
    first = config.score if args.score in (None, "both") else args.score
    scores = [first, *(name for name in SCORES if name != first and args.score == "both")]
    evaluated_on = evaluated_as(args.dataset, split, data.eval_split)
    path = config.result(evaluated_on, task)
    if ranks.first:
        must_write(path.parent)  # known before it computes
    val = open_val(args, pairs, run, task, identity) if args.val else None
    kind, correction, bank = choose_hubs(args, run, pairs, val, task, identity, adaptor.refit)
    by, absent = column_of(args.by) if args.by else None, None
    if args.absent:
        if pairs.classes is not None or correction:
            raise UserError("--absent is for captions and their scores as they are: leave it out, or --hubs none.")
        absent = open_absent(args.absent, config, identity, run.folder, adaptor.pooled, device)
    quiet = args.quiet or not ranks.first
    choices = Choices(scores, count, args.levels_by, args.drop_remainder, quiet, val, correction, bank,
                      args.prior, tuple(args.alpha or ALPHAS), by, absent, args.predictors)  # fmt: skip
    try:
        chosen_task = importlib.import_module(f"tasks.{task}")
        with score_tiles.divided(ranks.rank, ranks.world, ranks.gather):
            figures, arrays = chosen_task.evaluate(adaptor, pairs, choices, device)
    except FloatingPointError as error:
        pairs.must_be_finite(adaptor.pooled)
        raise UserError(f"{run.folder} on {pairs.folder}: {error}.") from None
    if not ranks.first:
        return
    fold = fold_of(split)
    metadata = {
        "task": task, "evaluated_on": evaluated_on, "split": split, "uncer_levels": count,
        "levels_by": args.levels_by, "drop_remainder": args.drop_remainder,
        "images": len(pairs.image), "captions": len(pairs.text), "classes": len(pairs.classes or ()),
        "skipped": pairs.meta["skipped"], "fold": fold and [fold.number, fold.folds],
        "seen_in_training": pairs.shared_with(run.seen), "untrained": run.untrained,
        "start_kept": run.start_kept, "from_disk": run.from_disk,
        "repeated_captions": repeated(pairs),
        "val": args.val, "val_fingerprint": val and val.meta["fingerprint"],
        "fingerprint": pairs.meta["fingerprint"], "checkpoint": weights, "variant": config.variant,
    }  # fmt: skip
    if correction:
        metadata["hubs"] = {name: one._asdict() for name, one in correction.items()}
        metadata["hubs"]["bank"] = {"images": len(bank.image), "split": args.bank}
    chosen = {"score": first, "hubs": kind}
    made = {"made_with": made_with(device), "config": dataclasses.asdict(config) | chosen}
    with locked(path.parent):
        result_file.write(path, metadata | made | figures, arrays)
        if task == "matching":
            write_text(path.with_suffix(".csv"), chosen_task.thresholds_csv(figures))
    if task == "conformal" and pairs.classes is None and kind == "none" and args.dataset == config.dataset:
        from tasks.answers import keep  # only here the split becomes a gallery

        keep(adaptor, pairs, first, device, config, evaluated_on, weights, quiet)
    if not args.quiet:
        values = metadata | made | figures
        print(evaluations.as_text(path, values) if task in DECISIONS else result_text(values))
    print(path)


@exits_cleanly(interrupted=INTERRUPTED)
@reported
def main(argv=None):
    args, config, data = parse(argv)
    with Ranks() as ranks:
        evaluate(args, config, data, ranks)


if __name__ == "__main__":
    main()
