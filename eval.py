"""Evaluate a trained adaptor: what it finds, and how well its uncertainty tells which answers to trust.

    python eval.py --dataset coco --method asymvlm-psd --seed 0 --uncer_levels 10
    python eval.py --dataset cifar10 --train-dataset coco --method asymvlm-psd --seed 0

Pairs are retrieved both ways, images with classes are classified by prompts (zero-shot). Writes
results/<trained on>/<backbone>/<variant>/seed<k>/<evaluated on>-<task>.json, and beside it an .npz of what was measured
per query.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special

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
SIDES = ("text_to_image", "image_to_text")
SCORES = ("log_likelihood", "similarity")
LEVELS = 10
EXAMPLES = 10  # most and least certain captions kept for the report


def parse(argv):
    parser = make_parser(__doc__)
    add_data_flags(parser, "evaluated on")
    add_run_flags(parser)
    parser.add_argument("--train-dataset", help="trained on; by default what is evaluated on")
    parser.add_argument("--split", help="evaluated on; by default the data set's own choice")
    parser.add_argument("--allow-leakage", action="store_true", help="evaluate on images that were trained on, too")
    which = "which score ranks; by default the method's choice, which stands first where both are asked for"
    parser.add_argument("--score", choices=[*SCORES, "both"], help=which)
    levels = f"levels of uncertainty of equal size; by default {LEVELS}, or as many as there are queries"
    parser.add_argument("--uncer_levels", "--uncer-levels", type=int, help=levels)
    parser.add_argument("--quiet", action="store_true", help="print nothing but where the result lies")
    return parser.parse_args(argv)


def seen_images(pairs, seen):
    """Count the images of opened pairs that a run has `seen` in training, by their sources' own ids."""
    if pairs.meta["id_space"] != seen["id_space"]:
        return 0
    return int(np.isin(pairs.image_id, seen["image_id"].numpy()).sum())


def retrieve(score, scale, image, text, image_of_text):
    """Rank images for every caption and captions for every image; `scale` makes a posterior of the scores."""
    caption, images = np.arange(len(image_of_text)), len(image.mean)
    t2i = retrieval.rank(lambda rows: score(image, text.rows(rows)).T, images, caption, image_of_text, scale)
    i2t = retrieval.rank(lambda rows: score(image.rows(rows), text), len(caption), image_of_text, caption, scale)
    return t2i, i2t


def judge(ranking, limit):
    """Summarize a ranking of Q queries: recall, and how well the scores over the gallery tell right answers from wrong.

    limit: Bayes-optimal R@1 (Q,) or None.
    """
    hits = {k: retrieval.recall_at(ranking, k) for k in KS}
    doubts = {"top": -ranking.score, "margin": -ranking.margin, "entropy": ranking.entropy}
    doubts["probability"] = -ranking.probability
    result = {"recall": {str(k): float(hits[k].mean()) for k in KS}}
    result["gallery_aware"] = {name: uncertainty.auroc(doubt, hits[1]) for name, doubt in doubts.items()}
    if limit is not None:
        result["bayes_recall"] = float(limit.mean())
    return result


def judge_uncertainty(ranking, doubt, doubt_of, limit, count):
    """Summarize what the query-only uncertainty (Q,) of ranked queries is worth; `doubt_of` says whose it is."""
    hits = {k: retrieval.recall_at(ranking, k) for k in KS}
    levels = [
        {"count": len(rows), "uncertainty": [float(doubt[rows].min()), float(doubt[rows].max())]}
        | {"recall": {str(k): float(hits[k][rows].mean()) for k in KS}}
        | ({"bayes_recall": float(limit[rows].mean())} if limit is not None else {})
        for rows in uncertainty.levels(doubt, count)
    ]
    result = {"levels_by": doubt_of, "levels": levels, "auroc": uncertainty.auroc(doubt, hits[1])}
    return result | uncertainty.trend([level["recall"]["1"] for level in levels])._asdict()


def posterior_scales(adaptor, pairs):
    """What makes logits of each score."""
    return {"similarity": pairs.meta["logit_scale"], "log_likelihood": adaptor.posterior_scale}


def class_embeddings(pairs):
    """Average the prompts of every class, (C, D): unit vectors, as is usual (Radford et al., arXiv 2103.00020, 3.1.4).

    The average is as long as the prompts are on average, for methods that read something into the length.
    """
    text, owner = torch.from_numpy(np.array(pairs.text)).float(), torch.from_numpy(np.array(pairs.class_of_text))
    length = text.norm(dim=-1, keepdim=True)
    total = torch.zeros(len(pairs.classes), text.shape[1] + 1)
    total.index_add_(0, owner, torch.cat([text / length, length], dim=-1))
    return (F.normalize(total[:, :-1], dim=-1) * total[:, -1:] / owner.bincount()[:, None]).numpy()


def evaluate_classes(adaptor, scores, pairs, device, count):
    """Classify images by the prompts of their classes; returns and takes what `evaluate` does."""
    image = adapt_all(adaptor.adapt_image, pairs.image, device)
    prompt = adapt_all(adaptor.adapt_text, class_embeddings(pairs), device)
    scales, row = posterior_scales(adaptor, pairs), np.arange(len(pairs.label))

    def ranked(name):
        def score(rows):
            return getattr(adaptor, name)(image.rows(rows), prompt)

        return retrieval.rank(score, len(pairs.classes), row, pairs.label, scales[name])

    rankings = {name: ranked(name) for name in scores}
    arrays = {f"image_to_class_{name}": value for name, value in rankings[scores[0]]._asdict().items()}
    judged = {
        name: {"score": name, "posterior_scale": scales[name], "image_to_class": judge(ranking, None)}
        for name, ranking in rankings.items()
    }
    result = judged[scores[0]]
    if len(scores) > 1:
        result["other_score"] = judged[scores[1]]
    for whose, doubt in (("query image", image.uncertainty), ("predicted class", prompt.uncertainty)):
        if doubt is not None:
            doubt = doubt.cpu().double().numpy()
            doubt = doubt if whose == "query image" else doubt[rankings[scores[0]].top]
            result["image_to_class"] |= judge_uncertainty(rankings[scores[0]], doubt, whose, None, count)
            arrays["uncertainty"] = doubt
            break
    if pairs.human is not None:
        shares = np.asarray(pairs.human, dtype=np.float64)
        doubts = {"entropy": rankings[scores[0]].entropy, "query_image": image.uncertainty}
        arrays["human_entropy"] = special.entr(shares).sum(axis=1)
        result["image_to_class"]["spearman_human_entropy"] = {
            name: uncertainty.spearman(np.asarray(torch.as_tensor(doubt).cpu()), arrays["human_entropy"])
            for name, doubt in doubts.items()
            if doubt is not None
        }
    return result, arrays


def evaluate(adaptor, scores, pairs, device, count):
    """Evaluate an adaptor on opened pairs; returns the figures, and per-query arrays for the .npz.

    scores: names of one or both scores; the first ranks, of the other the recall is given beside it.
    """
    image = adapt_all(adaptor.adapt_image, pairs.image, device)
    text = adapt_all(adaptor.adapt_text, pairs.text, device)
    scales = posterior_scales(adaptor, pairs)
    rankings = {
        name: retrieve(getattr(adaptor, name), scales[name], image, text, pairs.image_of_text) for name in scores
    }
    t2i, i2t = rankings[scores[0]]
    arrays = {f"text_to_image_{name}": value for name, value in t2i._asdict().items()}
    arrays |= {f"image_to_text_{name}": value for name, value in i2t._asdict().items()}

    limits = None, None
    if pairs.matches is not None:
        own = np.bincount(pairs.image_of_text, minlength=len(pairs.image))
        limits = (
            retrieval.bayes_optimal_text_to_image(pairs.matches),
            retrieval.bayes_optimal_image_to_text(pairs.matches, own),
        )
        arrays |= {"ambiguity": retrieval.ambiguity(pairs.matches)}
        arrays |= {"text_limit": limits[0], "image_limit": limits[1]}
    judged = {
        name: {"score": name, "posterior_scale": scales[name]}
        | {side: judge(*both) for side, both in zip(SIDES, zip(ranked, limits, strict=True), strict=True)}
        for name, ranked in rankings.items()
    }
    result = judged[scores[0]]
    if len(scores) > 1:
        result["other_score"] = judged[scores[1]]
    doubts = {"text": text.uncertainty, "image": image.uncertainty}
    doubts = {side: None if doubt is None else doubt.cpu().double().numpy() for side, doubt in doubts.items()}
    arrays |= {f"{side}_uncertainty": doubt for side, doubt in doubts.items() if doubt is not None}
    if doubts["text"] is not None:
        about = doubts["text"], "query caption", limits[0], count
        result["text_to_image"] |= judge_uncertainty(t2i, *about)
        result["examples"] = examples(doubts["text"], retrieval.recall_at(t2i, 1), pairs, limits[0])
        if pairs.chains is not None:
            prompt = adapt_all(adaptor.adapt_text, pairs.chains["text"], device).uncertainty.cpu().numpy()
            chains, steps = uncertainty.falling_chains(prompt, pairs.chains["chain"], pairs.chains["depth"])
            result["prompt_chains"] = {"falling_chains": chains, "falling_steps": steps}
    if doubts["image"] is not None:
        result["image_to_text"] |= judge_uncertainty(i2t, doubts["image"], "query image", limits[1], count)
    elif doubts["text"] is not None:
        about = doubts["text"][i2t.top], "retrieved caption", limits[1], count
        result["image_to_text"] |= judge_uncertainty(i2t, *about)
    if pairs.matches is not None:
        if doubts["text"] is not None:
            correlation = uncertainty.spearman(doubts["text"], arrays["ambiguity"])
            result["text_to_image"]["spearman_ambiguity"] = correlation
        # What the best method would score if its uncertainty were the true ambiguity.
        best = [float(limits[0][rows].mean()) for rows in uncertainty.levels(arrays["ambiguity"], count)]
        result["bayes_optimal"] = {"levels": best} | uncertainty.trend(best)._asdict()
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
    split = args.split or data.eval_split
    pairs = Pairs(args.dataset, run.config.backbone, split)
    if pairs.classes is not None and not run.done and args.train_dataset is None:
        raise UserError(
            f"{args.dataset} has images with classes, on which nothing is trained: say with --train-dataset what the"
            " adaptor was trained on."
        )
    adaptor, config, identity = run.load(device)
    pairs.must_fit(identity, run.folder)
    task = "retrieval" if pairs.classes is None else "classification"
    seen = seen_images(pairs, run.seen)
    if seen and not args.allow_leakage:
        raise UserError(
            f"{run.folder} was trained on {seen:,} of the {len(pairs.image):,} images of {args.dataset} '{split}': name"
            " another --split or --train-dataset, or evaluate all the same with --allow-leakage, which the result says."
        )
    if task == "classification" and len(pairs.classes) < 2:
        raise UserError(f"{pairs.folder} has one class, '{pairs.classes[0]}': with no other there is nothing to tell.")
    queries = min([len(pairs.image), *([len(pairs.text)] if task == "retrieval" else [])])
    count = min(LEVELS, queries) if args.uncer_levels is None else args.uncer_levels
    if not 2 <= count <= queries:
        raise UserError(f"--uncer_levels must lie between 2 and {queries:,}, the number of queries, not {count}.")
    first = config.score if args.score in (None, "both") else args.score
    scores = [first, *(name for name in SCORES if name != first and args.score == "both")]
    judge_all = evaluate if task == "retrieval" else evaluate_classes
    try:
        result, arrays = judge_all(adaptor, scores, pairs, device, count)
    except FloatingPointError as error:
        raise UserError(f"{run.folder} on {pairs.folder}: {error}.") from None
    evaluated_on = args.dataset + f"+{split}" * (split != data.eval_split)
    about = {
        "task": task, "evaluated_on": evaluated_on, "split": split, "uncer_levels": count,
        "images": len(pairs.image), "captions": len(pairs.text), "skipped": pairs.meta["skipped"],
        "seen_in_training": seen,
        "fingerprint": pairs.meta["fingerprint"], "checkpoint": run.weights_hash(), "variant": config.variant,
    }  # fmt: skip
    path = config.result(evaluated_on, task)
    path.unlink(missing_ok=True)  # its arrays are about to be others
    save_arrays(path.with_suffix(".npz"), **arrays)
    write_json(path, about | {"config": dataclasses.asdict(config) | {"score": first}} | result)
    if not args.quiet:
        print(levels_table(about | result) if task == "retrieval" else accuracy_line(about | result, pairs))
    print(path)


def accuracy_line(result, pairs):
    """Say how many images were classified rightly, and how well doubts tell which."""
    part, said = result["image_to_class"], f"{result['variant']} on {result['evaluated_on']}"
    said += f" ({result['images']:,} images, {len(pairs.classes):,} classes, {result['captions']:,} prompts)"
    said += f"\n  top-1 {100 * part['recall']['1']:.2f} %, top-5 {100 * part['recall']['5']:.2f} %"
    doubts = {"entropy": part["gallery_aware"]["entropy"]}
    doubts |= {f"uncertainty of the {part['levels_by']}": part["auroc"]} if "levels_by" in part else {}
    told = ", ".join(f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in doubts.items())
    return f"{said}\n  AUROC of the right answer, by {told}"


if __name__ == "__main__":
    main()
