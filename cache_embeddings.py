"""Encode the images and captions of a data set, once, with a frozen vision-language model.

    python cache_embeddings.py --dataset coco --root /data/coco
    python cache_embeddings.py --dataset pairs --root mine.csv
    python cache_embeddings.py --dataset embeddings --root pairs.npz
    torchrun --nproc-per-node 4 cache_embeddings.py --dataset cc3m --root /data/cc3m

writes embeddings/<dataset>/<backbone>/<split>/. A killed run resumes where it stopped, with any number of processes; a
finished split is left unchanged.
"""

import utils.interrupt  # noqa: F401

# isort: split
from utils.arguments import add_data_flags, make_parser
from utils.config import load_config, make_source
from utils.errors import GOES_ON, UserError, exits_cleanly


@exits_cleanly()
def parse(argv=None):
    """The flags, and the Config that they name."""
    parser = make_parser(__doc__)
    add_data_flags(parser, "the data set to encode")
    parser.add_argument("--root", help="folder of the raw data in its publisher's layout, or file of pairs")
    parser.add_argument("--splits", nargs="+", help="splits to encode; by default those to train and to evaluate on")
    on_error = "stop at an image or caption that is missing or unreadable (default), or skip it"
    parser.add_argument("--on-error", choices=["stop", "skip"], default="stop", help=on_error)
    features = "pooled: also store the inputs and the weights of the last projections; default: final"
    parser.add_argument("--features", choices=["final", "pooled"], default="final", help=features)
    parser.add_argument("--workers", type=int, help="processes that decode images; by default one per core")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing cache that differs")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override any configuration key")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers must be at least 0, not {args.workers}.")
    config = load_config(args.dataset, backbone=args.backbone, settings=args.set)
    config.data.root = args.root or config.data.root
    return args, config


if __name__ == "__main__":
    parse()  # --help and wrong flags end here, before the seconds in which torch loads

import contextlib
import functools
import itertools
import shutil
import sys

from datasets.caching import identity, mismatch, write_cache, write_given
from datasets.embeddings import META, WORKING, cache_folder, cached_as, changed_part, read_meta
from datasets.listing import list_split
from datasets.ranks import Ranks, reported
from models.backbones import make_backbone
from models.precision import set_precision
from utils.device import pick_device, usable_cores
from utils.files import locked


def say(ranks, folder, more=""):
    """Print one line about the content of a cache, on the first rank only."""
    if not ranks.first:
        return
    meta = read_meta(folder)
    texts = "captions" if "classes" not in meta else f"prompts for {len(meta['classes']):,} classes"
    line = f"{folder}: {meta['images']:,} images, {meta['captions']:,} {texts}, D = {meta['dim']}"
    if empty := meta.get("classes_without_images"):  # such a class is a wrong answer to every image
        line += f", no image of {', '.join(map(repr, empty[:3]))}{f' and {len(empty) - 3:,} more' if empty[3:] else ''}"
    if repeated := meta.get("images_repeated"):  # of two equal images the right answer can be but one
        line += f", {repeated:,} that the backbone sees as an earlier one"
    if meta["skipped"]:
        line += f", {meta['skipped']:,} left out (skipped.jsonl)"
    if meta["captions_cut"]:
        line += f", {meta['captions_cut']:,} cut to the length that the model reads"
    print(line + more)


def finished(folder, wanted, args):
    """Whether `folder` holds the wanted cache; raises UserError if it holds another and --overwrite is not set."""
    if not (folder / META).is_file():
        return False
    existing = read_meta(folder)
    difference = mismatch(existing, wanted)
    parts = itertools.chain(*existing.get("parts", {}).values())
    if not difference and (part := changed_part(folder, parts)):
        difference = f"from {part}, which is missing or has changed since"
    if not difference and args.on_error == "stop" and existing["unreadable"]:
        difference = f"without {existing['unreadable']:,} unreadable images, which --on-error skip accepts"
    if difference and not args.overwrite:
        raise UserError(
            f"{folder} was made {difference}: replace it with --overwrite, or cache this under another name, that of a"
            f" copy of configs/datasets/{wanted['dataset']}.yaml."
        )
    if not difference and (folder / WORKING).is_dir():  # left by a kill just before the end
        with locked(folder):
            shutil.rmtree(folder / WORKING)
    return not difference


def cache(args, config, ranks):
    """Encode the splits as process `ranks` among several."""
    device = pick_device(args.device, ranks.local)
    set_precision(device)
    workers = usable_cores() // ranks.neighbors if args.workers is None else args.workers
    source = make_source(config)
    backbone = None
    todo = []  # all splits are checked before any is encoded
    for split in dict.fromkeys(map(cached_as, args.splits or [config.data.train_split, config.data.eval_split])):
        folder = cache_folder(config.dataset, config.backbone, split)
        listing = ranks.in_turn(functools.partial(list_split, source, split, args.on_error))
        if listing.embeddings is not None and args.features == "pooled":
            raise UserError(f"'{config.dataset}' has embeddings but no pooled features: leave out --features pooled.")
        wanted = identity(config, split, source, listing, args.features)
        if ranks.broadcast(ranks.first and finished(folder, wanted, args)):
            say(ranks, folder, " (already there)")
        else:
            todo.append((folder, wanted, listing))
    for folder, wanted, listing in todo:
        with locked(folder) if ranks.first else contextlib.nullcontext():
            if listing.embeddings is not None:
                if ranks.first:
                    write_given(folder, wanted, source, listing)
            else:
                if backbone is None:
                    if not args.quiet and ranks.first and sys.stderr.isatty():
                        print(f"loading {config.encoder.model} ...", file=sys.stderr)
                    backbone = ranks.in_turn(functools.partial(make_backbone, config.encoder, device))
                options = {"on_error": args.on_error, "workers": workers, "quiet": args.quiet}
                write_cache(folder, wanted, source, listing, backbone, ranks, **options)
        say(ranks, folder)


@exits_cleanly(interrupted=GOES_ON)
@reported
def main(argv=None):
    args, config = parse(argv)
    with Ranks() as ranks:
        cache(args, config, ranks)


if __name__ == "__main__":
    main()
