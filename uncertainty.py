"""Print the uncertainty that a trained method gives prompts or image files.

    python uncertainty.py --dataset shapes --method asymvlm-psd "a photo" "a photo of a circle"

prints them in the order given; larger = less certain. Image files need a method that models images; AsymVLM does not.
What exists as a file or folder is no prompt.
"""

import utils.interrupt  # noqa: F401

# isort: split
from utils.arguments import add_data_flags, add_run_flags, make_parser, run_config
from utils.config import Encoder
from utils.errors import UserError, exits_cleanly


@exits_cleanly()
def parse(argv=None):
    """The flags, and the Config of the run that they name."""
    parser = make_parser(__doc__)
    parser.add_argument("items", nargs="+", metavar="PROMPT_OR_IMAGE", help="prompts, or paths of image files")
    add_data_flags(parser, "trained on")
    add_run_flags(parser)
    parser.add_argument("--sort", action="store_true", help="least certain first")
    parser.add_argument("--json", action="store_true", help="print a JSON list of item, kind and uncertainty")
    args = parser.parse_args(argv)
    if any(not item.strip() for item in args.items):
        raise UserError("a prompt is empty: give at least one word.")
    return args, run_config(args, args.dataset)


if __name__ == "__main__":
    parse()  # --help and wrong flags end here, before the seconds in which torch loads

import json
import mimetypes
import os
import sys
from pathlib import Path

import PIL.Image
import torch

from datasets.embeddings import encoder_fingerprint
from models.backbones import make_backbone
from models.backbones.last_map import join
from models.backbones.pixels import lenient
from models.precision import set_precision
from utils.checkpoint import Run
from utils.device import pick_device


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
def measure(items, adaptor, backbone, method, device):
    """The kind and the uncertainty of each item, in order; raises UserError for a kind that it does not model."""
    kinds = ["image" if is_image(item) else "text" for item in items]
    adapt = {"image": adaptor.adapt_image, "text": adaptor.adapt_text}
    uncertainties = {}
    for kind in dict.fromkeys(kinds):
        names = [item for item, other in zip(items, kinds, strict=True) if other == kind]
        # Through float16, as the cache keeps what the adaptor was trained on.
        adapted = adapt[kind](encode(kind, names, backbone, adaptor.pooled).half().float().to(device))
        if adapted.uncertainty is None:
            what = "images" if kind == "image" else "captions"
            raise UserError(
                f"{method} has no uncertainty for {what} ('{names[0]}'): leave them out, or choose a method that models"
                " them."
            )
        uncertainties[kind] = iter(adapted.uncertainty.tolist())
    return [
        {"item": item, "kind": kind, "uncertainty": next(uncertainties[kind])}
        for item, kind in zip(items, kinds, strict=True)
    ]


@exits_cleanly()
def main(argv=None):
    args, config = parse(argv)
    device = pick_device(args.device)
    set_precision(device)
    run = Run(config)
    adaptor, config, identity = run.load(device)
    encoder = Encoder(**identity["encoder"])
    if encoder.pretrained == "elsewhere":
        raise UserError(
            f"{run.folder} was trained on embeddings computed elsewhere, so no backbone is at hand to encode prompts or"
            " images: the uncertainties of cached captions are in the .npz that eval.py writes."
        )
    if encoder_fingerprint(encoder) != identity["encoder_fingerprint"]:
        raise UserError(
            f"the weights of backbone '{config.backbone}' differ from those that {run.folder} was trained on: restore"
            " them, or cache and train again with --overwrite."
        )
    backbone = make_backbone(encoder, device)
    if backbone.dim != identity["dim"]:  # embeddings computed elsewhere, cached under a backbone's name
        raise UserError(
            f"{run.folder} was trained on embeddings of size {identity['dim']}, but backbone '{config.backbone}' gives"
            f" size {backbone.dim}: cache and train with the backbone that they are from."
        )
    if run.untrained:
        print(f"{run.folder} kept its untrained start: these are uncertainties of random weights.", file=sys.stderr)
    for item in args.items:
        if not is_image(item) and not backbone.reads_whole(item):
            print(f"'{item[:40]}...' is longer than the backbone reads: its end is cut off.", file=sys.stderr)
    rows = measure(args.items, adaptor, backbone, config.method, device)
    if args.sort:
        rows.sort(key=lambda row: -row["uncertainty"])
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    width = min(80, max(len(row["item"]) for row in rows))
    for row in rows:
        print(f"{row['item']:{width}}  {row['uncertainty']:.4g}")


if __name__ == "__main__":
    main()
