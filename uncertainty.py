"""Print the uncertainty that a trained method gives prompts or image files.

    python uncertainty.py --dataset shapes --method asymvlm-psd "a photo" "a photo of a circle"

prints them in the order given; larger = less certain. Image files need a method that models images; AsymVLM does not.
What exists as a file or folder is no prompt. With --gallery SPLIT, a cached split whose images answer prompts and whose
captions answer image files, it prints

    python uncertainty.py --dataset shapes --method clip --gallery val "a photo of a circle"

the best answers, the probabilities that the first is right and that nothing fits, and how many answers it takes to hold
a right one; eval.py --task conformal and --task unanswerable have to have learned that from labels.
"""

import utils.interrupt  # noqa: F401

# isort: split
from pathlib import Path

from utils.arguments import add_data_flags, add_run_flags, check_share, make_parser, run_config
from utils.config import Encoder, evaluated_as, load_config, needs_pooled
from utils.errors import UserError, exits_cleanly

SHARE = 0.1  # of --alpha and --unanswerable


@exits_cleanly()
def parse(argv=None):
    """The flags, and the Config of the run that they name."""
    parser = make_parser(__doc__)
    parser.add_argument("items", nargs="+", metavar="PROMPT_OR_IMAGE", help="prompts, or paths of image files")
    add_data_flags(parser, "trained on")
    add_run_flags(parser)
    parser.add_argument("--sort", action="store_true", help="least certain first")
    parser.add_argument("--json", action="store_true", help="print a JSON list of items, their kind and what is known")
    parser.add_argument("--gallery", metavar="SPLIT", help="a cached split of the data set to search")
    learned = "the split whose labels have taught eval.py; by default the gallery's"
    parser.add_argument("--learned-on", metavar="SPLIT", help=learned)
    alpha = "share of queries whose set may lack the right answer; by default 0.1"
    parser.add_argument("--alpha", type=float, help=alpha)
    share = "share of queries to which nothing in the gallery is an answer; by default 0.1"
    parser.add_argument("--unanswerable", type=float, metavar="SHARE", help=share)
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the answers as a page with their pictures")
    args = parser.parse_args(argv)
    for flag in ("html", "learned_on", "alpha", "unanswerable"):
        if getattr(args, flag) is not None and not args.gallery:
            raise UserError(f"--{flag.replace('_', '-')} is for the answers of a --gallery: name one, or leave it out.")
    for flag in ("alpha", "unanswerable"):
        if getattr(args, flag) is None:
            setattr(args, flag, SHARE)
        check_share(f"--{flag}", getattr(args, flag))
    if args.html and args.html.is_dir():
        raise UserError(f"--html {args.html} is a folder: name a file.")
    if any(not item.strip() for item in args.items):
        raise UserError("a prompt is empty: give at least one word.")
    return args, run_config(args, args.dataset)


if __name__ == "__main__":
    parse()  # --help and wrong flags end here, before the seconds in which torch loads

import json
import mimetypes
import os
import sys

import PIL.Image
import torch

from datasets.embeddings import Pairs, encoder_fingerprint
from models.backbones import make_backbone
from models.backbones.last_map import join
from models.backbones.pixels import lenient
from models.precision import set_precision
from reporting.words import DIRECTIONS
from utils.checkpoint import Run
from utils.device import pick_device
from utils.files import read_json, write_text

LISTED = 100  # most answers of a set that are listed


def is_image(item):
    """Whether an item is a path, not a prompt: it exists, or two of its folders, suffix and lack of blanks say so."""
    suffix = mimetypes.guess_type(item)[0] or Path(item).suffix.lower() in PIL.Image.registered_extensions()
    return os.path.exists(item) or (Path(item).name != item) + bool(suffix) + (len(item.split()) == 1) >= 2


def pixels(name, transform):
    """Load an image file as the backbone sees it, (3, H, W)."""
    try:
        with lenient():
            image = PIL.Image.open(name)
        with image:
            return transform(image)
    except FileNotFoundError:
        if "://" in name:
            raise UserError(f"{name} is a link: download the image and name its file.") from None
        raise UserError(f"there is no image file {name}: name one, or let a prompt look less like a path.") from None
    except Exception as error:  # Pillow raises a dozen kinds on a broken file
        raise UserError(
            f"{name} cannot be read as an image ({error}): name an image, or add a word to a prompt that is called like"
            " a file or folder here."
        ) from None


def encode(kind, items, backbone, pooled):
    """Encode items of one kind, `image` or `text`, as `Pairs.fed` gives them: (N, D), or (N, D + P) where `pooled`."""
    if kind == "image":
        items = torch.stack([pixels(name, backbone.transform) for name in items])
    if not pooled:
        return backbone.encode_images(items) if kind == "image" else backbone.encode_texts(items)
    output = backbone.pooled_images(items) if kind == "image" else backbone.pooled_texts(items)
    return join(output.embedding, output.pooled, backbone.projection[kind].bias is not None)


@torch.inference_mode()
def adapted(items, adaptor, backbone, device):
    """Adapt items of each kind: {kind: (their positions, Embedding)}."""
    kinds = ["image" if is_image(item) else "text" for item in items]
    adapt, result = {"image": adaptor.adapt_image, "text": adaptor.adapt_text}, {}
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        names = [items[place] for place in places]
        # Through float16, as the cache keeps what the adaptor was trained on.
        result[kind] = places, adapt[kind](encode(kind, names, backbone, adaptor.pooled).half().float().to(device))
    return result


def measure(items, embeddings, method):
    """The kind and the uncertainty of each item, in order; raises UserError for a kind that the method does not model.

    embeddings: as `adapted` gives them.
    """
    rows = [None] * len(items)
    for kind, (places, embedding) in embeddings.items():
        if embedding.uncertainty is None:
            what = "images" if kind == "image" else "captions"
            raise UserError(
                f"{method} has no uncertainty for {what} ('{items[places[0]]}'): leave them out, or choose a method"
                " that models them."
            )
        for place, value in zip(places, embedding.uncertainty.tolist(), strict=True):
            rows[place] = {"item": items[place], "kind": kind, "uncertainty": value}
    return rows


def learned(run, weights, config, data, split):
    """What eval.py has learned from a split's labels: {task: its result}; raises UserError where it has not."""
    results = {}
    for task in ("conformal", "unanswerable"):
        path = config.result(evaluated_as(config.dataset, split, data.eval_split), task)
        command = config.command.replace("train.py", "eval.py", 1) + f" --split {split} --task {task}"
        try:
            results[task] = read_json(path)
            sides = [side for side in DIRECTIONS if side in results[task]]
            stale = results[task]["checkpoint"] != weights or not all("fitted" in results[task][s] for s in sides)
        except FileNotFoundError:
            raise UserError(f"{path} is missing, from which to answer: run `{command}`.") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: delete it and run `{command}`.") from None
        if stale:
            raise UserError(f"{path} is of other weights than {run.folder}: run `{command}` again.")
        if results[task]["config"]["hubs"] != "none":
            raise UserError(
                f"{path} is of scores corrected for hubs, which no new query has: run `{command} --hubs none`."
            )
    if results["conformal"]["score"] != results["unanswerable"]["score"]:
        raise UserError(
            f"the results of {split} in {path.parent} are of two scores: evaluate both tasks with one --score."
        )
    return results


def search(args, run, weights, config, identity, embeddings, adaptor, device):
    """Answer items from the gallery: a list of dicts in their order.

    weights: hash of those that the adaptor was loaded with. embeddings: as `adapted` gives them.
    """
    from tasks import answers  # only here: it takes a second to import

    data = load_config(config.dataset, backbone=config.backbone).data
    pairs = Pairs(config.dataset, config.backbone, args.gallery, needs_pooled(config))
    pairs.must_fit(identity, run.folder)
    if pairs.classes is not None:
        raise UserError(f"{pairs.folder} has classes and no captions: name a --gallery of pairs.")
    taught = args.learned_on or args.gallery
    results = learned(run, weights, config, data, taught)
    known = results["conformal"]["alphas"]
    if f"{args.alpha:g}" not in known:
        raise UserError(
            f"--alpha {args.alpha:g} is none of {', '.join(known)}, for which eval.py --task conformal learned."
        )
    rows = [None] * len(args.items)
    for kind, (places, embedding) in embeddings.items():
        direction, other = ("text_to_image", "image") if kind == "text" else ("image_to_text", "text")
        sets, rejection = (results[task][direction] for task in ("conformal", "unanswerable"))
        count, usual = len(getattr(pairs, other)), max(sets["taught_by"]["galleries"])
        if not 0.9 < count / usual < 1.1:
            print(f"what was learned is of galleries of {usual:,}, and this has {count:,}: no probability or set is"
                  " certain to hold.", file=sys.stderr)  # fmt: skip
        score, evaluated_on = results["conformal"]["score"], evaluated_as(config.dataset, args.gallery, data.eval_split)
        gallery = answers.Gallery(adaptor, pairs, other, score, device)
        try:
            scores = gallery.scores(embedding, answers.kept(config, evaluated_on, other, score, weights, pairs))
        except FloatingPointError as error:
            raise UserError(f"{run.folder} on {pairs.folder}: {error}.") from None
        part = answers.answers(scores, embedding, sets, rejection, args.alpha, args.unanswerable)
        for place, row in zip(places, part, strict=True):
            for best in row["best"]:
                best["answer"] = pairs.items[other][best.pop("item")]
            row["set"] = [pairs.items[other][number] for number in row["set"][:LISTED]]
            rows[place] = {"item": args.items[place], "kind": kind, "alpha": args.alpha} | row
            if embedding.uncertainty is not None:
                rows[place]["uncertainty"] = float(embedding.uncertainty[places.index(place)])
    teaching = pairs if taught == args.gallery else Pairs(config.dataset, config.backbone, taught)
    prompts = [row for row in rows if row["kind"] == "text"]
    unseen = answers.unseen_words([row["item"] for row in prompts], teaching.items["text"])
    for row, words in zip(prompts, unseen, strict=True):
        row["unseen_words"] = words
    return rows


def print_answers(rows):
    for row in rows:
        print(row["item"])
        print(f"  the first answer is right: {row['right']:.2f}; nothing fits: {row['nothing_fits']:.2f}")
        if row.get("unseen_words"):
            print(f"  no caption that taught this has the word {', '.join(row['unseen_words'])}: it need not hold here")
        print(f"  the first {row['set_size']:,} hold a right answer, if there is one: {1 - row['alpha']:g}")
        for best in row["best"]:
            print(f"  {best['probability']:6.3f}  {best['answer']}")


def open_backbone(config, identity, folder, device):
    """The frozen model that a run was trained on; raises UserError unless it is at hand, and the same.

    identity: what the run of `folder` was trained on.
    """
    encoder = Encoder(**identity["encoder"])
    if encoder.pretrained == "elsewhere":
        raise UserError(
            f"{folder} was trained on embeddings computed elsewhere, so no backbone is at hand to encode prompts or"
            " images: the uncertainties of cached captions are in the .npz that eval.py writes."
        )
    if encoder_fingerprint(encoder) != identity["encoder_fingerprint"]:
        raise UserError(
            f"the weights of backbone '{config.backbone}' differ from those that {folder} was trained on: restore"
            " them, or cache and train again with --overwrite."
        )
    backbone = make_backbone(encoder, device)
    if backbone.dim != identity["dim"]:  # embeddings computed elsewhere, cached under a backbone's name
        raise UserError(
            f"{folder} was trained on embeddings of size {identity['dim']}, but backbone '{config.backbone}' gives"
            f" size {backbone.dim}: cache and train with the backbone that they are from."
        )
    return backbone


@exits_cleanly()
def main(argv=None):
    args, config = parse(argv)
    device = pick_device(args.device)
    set_precision(device)
    run = Run(config)
    adaptor, config, identity = run.load(device)
    weights = run.weights_hash()  # of what was loaded: another process may train again meanwhile
    backbone = open_backbone(config, identity, run.folder, device)
    if run.untrained:
        print(f"{run.folder} kept its untrained start: these are uncertainties of random weights.", file=sys.stderr)
    for item in args.items:
        if not is_image(item) and not backbone.reads_whole(item):
            print(f"'{item[:40]}...' is longer than the backbone reads: its end is cut off.", file=sys.stderr)
    embeddings = adapted(args.items, adaptor, backbone, device)
    if args.gallery:
        rows = search(args, run, weights, config, identity, embeddings, adaptor, device)
    else:
        rows = measure(args.items, embeddings, config.method)
    if args.sort:
        rows.sort(key=lambda row: -row.get("uncertainty", -row.get("right", 0)))
    if args.html:
        from reporting.answers import page

        write_text(args.html, page(rows))
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    if args.gallery:
        print_answers(rows)
        return
    width = min(80, max(len(row["item"]) for row in rows))
    for row in rows:
        print(f"{row['item']:{width}}  {row['uncertainty']:.4g}")


if __name__ == "__main__":
    main()
