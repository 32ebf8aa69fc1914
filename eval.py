"""Evaluate a trained adaptor: what it finds, and how well its uncertainty tells which answers to trust.

    python eval.py --dataset coco --method asymvlm-psd --seed 0 --uncer_levels 10
    python eval.py --dataset cifar10 --train-dataset coco --method asymvlm-psd --seed 0
    python eval.py --dataset shapes-objects --train-dataset shapes --method bayesvlm --split shifted-test --val val
    python eval.py --dataset hierarcaps --train-dataset coco --method asymvlm-psd --seed 0 --task hierarchy

Pairs are retrieved both ways, images with classes are classified by prompts (zero-shot), and of chains of prompts it is
asked whether uncertainty falls along them. --val adds a temperature that is fitted on another split's labels.
Writes results/<trained on>/<backbone>/<variant>/seed<k>/<evaluated on>-<task>.json, and beside it an .npz of what was
measured per query.
"""

import dataclasses

import numpy as np

from datasets.embeddings import Pairs
from tasks import FOLLOWED, SCORES, Choices, classification, hierarchy, retrieval
from utils.arguments import add_data_flags, add_run_flags, make_parser, run_config
from utils.checkpoint import Run
from utils.config import LEVELS, load_config, needs_pooled
from utils.device import pick_device
from utils.errors import UserError, exits_cleanly
from utils.files import locked, save_arrays, write_json
from utils.terminal import result_text

TASKS = {"retrieval": retrieval, "classification": classification, "hierarchy": hierarchy}


def parse(argv):
    parser = make_parser(__doc__)
    add_data_flags(parser, "evaluated on")
    add_run_flags(parser)
    parser.add_argument("--train-dataset", help="trained on; by default what is evaluated on")
    parser.add_argument("--split", help="evaluated on; by default the data set's own choice")
    parser.add_argument("--allow-leakage", action="store_true", help="evaluate on images that were trained on, too")
    which = "which score ranks; by default the method's choice, which stands first where both are asked for"
    parser.add_argument("--score", choices=[*SCORES, "both"], help=which)
    task = "by default classification where images have classes, else retrieval; chains of prompts are in both"
    parser.add_argument("--task", choices=TASKS, help=task)
    levels = f"levels of uncertainty of equal size; by default {LEVELS}, or as many as there are queries"
    parser.add_argument("--uncer_levels", "--uncer-levels", type=int, help=levels)
    by = "whose uncertainty the levels of images follow: theirs, their best answers' or the sum; by default the first"
    parser.add_argument("--levels_by", "--levels-by", choices=FOLLOWED, help=by)
    drop = "levels of one size without the most uncertain queries left over, as the public AsymVLM code has them"
    parser.add_argument("--drop_remainder", "--drop-remainder", action="store_true", help=drop)
    val = "split of the same classes, on all of whose labeled images a temperature is fitted, beside the others"
    parser.add_argument("--val", metavar="SPLIT", help=f"of classification: {val}")
    parser.add_argument("--quiet", action="store_true", help="print nothing but where the result lies")
    return parser.parse_args(argv)


def seen_images(pairs, seen):
    """Count the images of opened pairs that a run has `seen` in training, by their sources' own ids."""
    if pairs.meta["id_space"] != seen["id_space"]:
        return 0
    return int(np.isin(pairs.image_id, seen["image_id"].numpy()).sum())


def open_val(args, pairs, run, identity):
    """Open the split of --val; raises UserError unless it has the classes of `pairs`, and images that are new to all.

    identity: what the run was trained on.
    """
    if pairs.classes is None:
        raise UserError(
            f"{pairs.folder} has captions and no classes: leave out --val, whose temperature is of classes."
        )
    val = Pairs(args.dataset, run.config.backbone, args.val, needs_pooled(run.config))
    val.must_fit(identity, run.folder)
    both = seen_images(pairs, val.seen(slice(None)))
    if both:
        raise UserError(
            f"--val {args.val} has {both:,} of the images that are evaluated, those of {pairs.folder}: name another"
            " split."
        )
    trained = seen_images(val, run.seen)
    if trained and not args.allow_leakage:
        raise UserError(
            f"--val {args.val} has {trained:,} images that were trained on: name another split, or use them all the"
            " same with --allow-leakage."
        )
    if val.classes != pairs.classes:
        raise UserError(f"{val.folder} has other classes than {pairs.folder}: name another --val.")
    return val


@exits_cleanly()
def main(argv=None):
    args = parse(argv)
    run = Run(run_config(args, args.train_dataset or args.dataset))
    data = load_config(args.dataset, backbone=run.config.backbone).data
    device = pick_device(args.device)
    split = args.split or data.eval_split
    pairs = Pairs(args.dataset, run.config.backbone, split, needs_pooled(run.config))
    if pairs.classes is not None and not run.done and args.train_dataset is None:
        raise UserError(
            f"{args.dataset} has images with classes, on which nothing is trained: say with --train-dataset what the"
            " adaptor was trained on."
        )
    adaptor, config, identity = run.load(device)
    pairs.must_fit(identity, run.folder)
    task = args.task or ("retrieval" if pairs.classes is None else "classification")
    if (task == "classification") != (pairs.classes is not None):
        holds = "captions and no classes" if pairs.classes is None else "classes and no captions"
        raise UserError(f"{pairs.folder} has {holds}: --task {task} is not for it.")
    if task == "hierarchy" and (args.score or args.levels_by or args.drop_remainder or args.uncer_levels is not None):
        raise UserError("--task hierarchy has neither scores nor levels: leave out what is about them.")
    seen = seen_images(pairs, run.seen)
    if seen and not args.allow_leakage:
        raise UserError(
            f"{run.folder} was trained on {seen:,} of the {len(pairs.image):,} images of {args.dataset} '{split}': name"
            " another --split or --train-dataset, or evaluate all the same with --allow-leakage, which the result says."
        )
    if task == "classification" and len(pairs.classes) < 2:
        raise UserError(f"{pairs.folder} has one class, '{pairs.classes[0]}': with no other there is nothing to tell.")
    count = min(LEVELS, pairs.queries) if args.uncer_levels is None else args.uncer_levels
    if not 2 <= count <= pairs.queries:
        raise UserError(f"--uncer_levels must lie between 2 and {pairs.queries:,}, the number of queries, not {count}.")
    first = config.score if args.score in (None, "both") else args.score
    scores = [first, *(name for name in SCORES if name != first and args.score == "both")]
    val = args.val and open_val(args, pairs, run, identity)
    choices = Choices(scores, count, args.levels_by, args.drop_remainder, args.quiet, val or None)
    try:
        result, arrays = TASKS[task].evaluate(adaptor, pairs, choices, device)
    except FloatingPointError as error:
        raise UserError(f"{run.folder} on {pairs.folder}: {error}.") from None
    evaluated_on = args.dataset + f"+{split}" * (split != data.eval_split)
    about = {
        "task": task, "evaluated_on": evaluated_on, "split": split, "uncer_levels": count,
        "levels_by": args.levels_by, "drop_remainder": args.drop_remainder,
        "images": len(pairs.image), "captions": len(pairs.text), "classes": len(pairs.classes or ()),
        "skipped": pairs.meta["skipped"],
        "seen_in_training": seen,
        "val": args.val, "val_fingerprint": val and val.meta["fingerprint"],
        "fingerprint": pairs.meta["fingerprint"], "checkpoint": run.weights_hash(), "variant": config.variant,
    }  # fmt: skip
    path = config.result(evaluated_on, task)
    with locked(path.parent):
        path.unlink(missing_ok=True)  # its arrays are about to be others
        save_arrays(path.with_suffix(".npz"), **arrays)
        write_json(path, about | {"config": dataclasses.asdict(config) | {"score": first}} | result)
    if not args.quiet:
        print(result_text(about | result))
    print(path)


if __name__ == "__main__":
    main()
