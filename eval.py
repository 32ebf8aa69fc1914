"""Evaluate a trained adaptor: retrieval both ways, and how well its uncertainty tells which answers to trust.

    python eval.py --dataset coco --method asymvlm-psd --seed 0 --uncer_levels 10

writes results/<trained on>/<backbone>/<variant>/seed<k>/<evaluated on>-retrieval.json, and beside it an .npz of what
was measured per query.
"""

import dataclasses

import numpy as np

from datasets.embeddings import Pairs
from metrics import retrieval, uncertainty
from models.base import adapt_all
from utils.arguments import add_data_flags, add_run_flags, make_parser, run_config
from utils.checkpoint import Run
from utils.config import load_config
from utils.device import pick_device
from utils.errors import UserError, exits_cleanly
from utils.files import save_arrays, write_json
from utils.tables import levels_table

KS = (1, 5, 10)
EXAMPLES = 10  # most and least certain captions kept for the report


def parse(argv):
    parser = make_parser(__doc__)
    add_data_flags(parser, "evaluated on")
    add_run_flags(parser)
    parser.add_argument("--train-dataset", help="trained on; by default what is evaluated on")
    parser.add_argument(
        "--uncer_levels", "--uncer-levels", type=int, default=10, help="levels of uncertainty of equal size"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but where the result lies")
    return parser.parse_args(argv)


def direction(ranking, doubt, doubt_of, limit, count):
    """Summarize one direction: recall, and per uncertainty level where there is an uncertainty.

    ranking: of Q queries. doubt: uncertainty (Q,) or None; doubt_of says whose. limit: Bayes-optimal R@1 (Q,) or None.
    """
    hits = {k: retrieval.recall_at(ranking, k) for k in KS}
    result = {"recall": {str(k): float(hits[k].mean()) for k in KS}}
    if limit is not None:
        result["bayes_recall"] = float(limit.mean())
    if doubt is not None:
        groups = uncertainty.levels(doubt, count)
        result["levels_by"] = doubt_of
        result["levels"] = [
            {"count": len(rows), "uncertainty": [float(doubt[rows].min()), float(doubt[rows].max())]}
            | {"recall": {str(k): float(hits[k][rows].mean()) for k in KS}}
            | ({"bayes_recall": float(limit[rows].mean())} if limit is not None else {})
            for rows in groups
        ]
        result |= uncertainty.trend([level["recall"]["1"] for level in result["levels"]])._asdict()
    return result


def evaluate(adaptor, score, pairs, device, count):
    """Evaluate an adaptor on opened pairs; returns the figures, and per-query arrays for the .npz."""
    image = adapt_all(adaptor.adapt_image, pairs.image, device)
    text = adapt_all(adaptor.adapt_text, pairs.text, device)
    score = getattr(adaptor, score)
    caption, image_of_text, matches = np.arange(len(pairs.text)), pairs.image_of_text, pairs.matches

    t2i = retrieval.rank(lambda rows: score(image, text.rows(rows)).T, len(pairs.image), caption, image_of_text)
    i2t = retrieval.rank(lambda rows: score(image.rows(rows), text), len(pairs.text), image_of_text, caption)
    arrays = {f"text_to_image_{name}": value for name, value in t2i._asdict().items()}
    arrays |= {f"image_to_text_{name}": value for name, value in i2t._asdict().items()}

    text_doubt = None if text.uncertainty is None else text.uncertainty.cpu().double().numpy()
    image_doubt, image_doubt_of = None, "query image"
    if image.uncertainty is not None:
        image_doubt = image.uncertainty.cpu().double().numpy()
    elif text_doubt is not None:
        image_doubt, image_doubt_of = text_doubt[i2t.top], "retrieved caption"
    text_limit = image_limit = None
    if matches is not None:
        text_limit = retrieval.bayes_optimal_text_to_image(matches)
        image_limit = retrieval.bayes_optimal_image_to_text(
            matches, np.bincount(image_of_text, minlength=len(pairs.image))
        )
        arrays |= {"ambiguity": retrieval.ambiguity(matches), "text_limit": text_limit, "image_limit": image_limit}
    result = {
        "text_to_image": direction(t2i, text_doubt, "query caption", text_limit, count),
        "image_to_text": direction(i2t, image_doubt, image_doubt_of, image_limit, count),
    }
    if matches is not None:  # what the best method would score if its uncertainty were the true ambiguity
        limits = [float(text_limit[rows].mean()) for rows in uncertainty.levels(arrays["ambiguity"], count)]
        result["bayes_optimal"] = {"levels": limits} | uncertainty.trend(limits)._asdict()
    if text_doubt is not None:
        arrays["text_uncertainty"] = text_doubt
        if matches is not None:
            correlation = uncertainty.spearman(text_doubt, arrays["ambiguity"])
            result["text_to_image"]["spearman_ambiguity"] = correlation
        result["examples"] = examples(text_doubt, retrieval.recall_at(t2i, 1), pairs, text_limit)
        if pairs.chains is not None:
            prompt = adapt_all(adaptor.adapt_text, pairs.chains["text"], device).uncertainty.cpu().numpy()
            chains, steps = uncertainty.falling_chains(prompt, pairs.chains["chain"], pairs.chains["depth"])
            result["prompt_chains"] = {"falling_chains": chains, "falling_steps": steps}
    if image.uncertainty is not None:
        arrays["image_uncertainty"] = image_doubt
    return result, arrays


def examples(doubt, hits, pairs, limit):
    """Pick the most and the least certain captions, no wording twice, with their images."""
    order, shown = np.argsort(doubt, kind="stable"), {}
    for name, rows in (("most_certain", order), ("least_certain", order[::-1])):
        distinct = {}
        for row in rows:
            distinct.setdefault(pairs.items["text"][row], row)
            if len(distinct) == EXAMPLES:
                break
        shown[name] = [
            {
                "caption": caption,
                "image": pairs.items["image"][pairs.image_of_text[row]],
                "uncertainty": float(doubt[row]),
                "hit": float(hits[row]),
                "fits": None if limit is None else round(1 / limit[row]),
            }
            for caption, row in distinct.items()
        ]
    return shown


@exits_cleanly()
def main(argv=None):
    args = parse(argv)
    run = Run(run_config(args, args.train_dataset or args.dataset))
    data = load_config(args.dataset, backbone=run.config.backbone).data
    device = pick_device(args.device)
    pairs = Pairs(args.dataset, run.config.backbone, data.eval_split)
    adaptor, config, identity = run.load(device)
    pairs.must_fit(identity, run.folder)
    smaller = min(len(pairs.image), len(pairs.text))
    if not 2 <= args.uncer_levels <= smaller:
        said = f"must lie between 2 and {smaller:,}, the size of the gallery"
        raise UserError(f"--uncer_levels {said}, not {args.uncer_levels}.")
    try:
        result, arrays = evaluate(adaptor, config.score, pairs, device, args.uncer_levels)
    except FloatingPointError as error:
        raise UserError(f"{run.folder} on {pairs.folder}: {error}.") from None
    about = {
        "task": "retrieval", "evaluated_on": args.dataset, "split": data.eval_split, "uncer_levels": args.uncer_levels,
        "images": len(pairs.image), "captions": len(pairs.text), "skipped": pairs.meta["skipped"],
        "fingerprint": pairs.meta["fingerprint"], "checkpoint": run.weights_hash(), "variant": config.variant,
    }  # fmt: skip
    path = config.result(args.dataset, "retrieval")
    path.unlink(missing_ok=True)  # its arrays are about to be others
    save_arrays(path.with_suffix(".npz"), **arrays)
    write_json(path, about | {"config": dataclasses.asdict(config)} | result)
    if not args.quiet:
        print(levels_table(about | result))
    print(path)


if __name__ == "__main__":
    main()
