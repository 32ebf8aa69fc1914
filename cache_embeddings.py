"""Encode a data set's images and captions with a frozen vision-language model, once.

    python cache_embeddings.py --dataset coco --root /data/coco
    python cache_embeddings.py --dataset pairs --root mine.csv
    python cache_embeddings.py --dataset embeddings --root pairs.npz
    torchrun --nproc-per-node 4 cache_embeddings.py --dataset cc3m --root /data/cc3m

writes embeddings/<dataset>/<backbone>/<split>/. A killed run goes on where it stopped, with as many processes as it is
given then; a finished split is left alone.
"""

import contextlib
import functools
import shutil
import sys

from datasets.caching import identity, mismatch, write_cache, write_given
from datasets.embeddings import META, WORKING, cache_folder, read_meta
from datasets.listing import list_split
from models.backbones import make_backbone
from utils.arguments import add_data_flags, make_parser
from utils.config import load_config, make_source
from utils.device import pick_device, usable_cores
from utils.errors import GOES_ON, UserError, exits_cleanly
from utils.files import locked
from utils.ranks import Ranks


def parse(argv):
    parser = make_parser(__doc__)
    add_data_flags(parser, "what to encode")
    parser.add_argument("--root", help="folder of the raw data, in its publisher's layout, or the file of pairs")
    parser.add_argument("--splits", nargs="+", help="which splits; by default the ones trained and evaluated on")
    on_error = "at an image or a caption that is missing or cannot be read: stop, or leave it out"
    parser.add_argument("--on-error", choices=["stop", "skip"], default="stop", help=on_error)
    features = "pooled: keep what the last projections are given, and their weights, too"
    parser.add_argument("--features", choices=["final", "pooled"], default="final", help=features)
    parser.add_argument("--workers", type=int, help="processes that decode images; by default one for each core")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache that holds something else")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override any configuration key")
    return parser.parse_args(argv)


def say(ranks, folder, more=""):
    """Print in a line what a cache holds, once."""
    if not ranks.first:
        return
    meta = read_meta(folder)
    texts = "captions" if "classes" not in meta else f"prompts for {len(meta['classes']):,} classes"
    said = f"{folder}: {meta['images']:,} images, {meta['captions']:,} {texts}, D = {meta['dim']}"
    said += f", {meta['skipped']:,} left out (skipped.jsonl)" if meta["skipped"] else ""
    said += f", {meta['captions_cut']:,} cut to the length that the model reads" if meta["captions_cut"] else ""
    print(said + more)


def finished(folder, wanted, args):
    """Whether `folder` holds the wanted cache; raises UserError where it holds another that may not be replaced."""
    if not (folder / META).is_file():
        return False
    held = read_meta(folder)
    made = mismatch(held, wanted)
    if not made and args.on_error == "stop" and held["unreadable"]:
        made = f"without {held['unreadable']:,} images that could not be read, which --on-error skip accepts"
    if made and not args.overwrite:
        raise UserError(
            f"{folder} was made {made}: replace it with --overwrite, or cache this under a name of its own, that of a"
            f" copy of configs/datasets/{wanted['dataset']}.yaml."
        )
    if not made and (folder / WORKING).is_dir():  # a kill at the very end has left it
        with locked(folder):
            shutil.rmtree(folder / WORKING)
    return not made


@exits_cleanly(interrupted=GOES_ON)
def main(argv=None):
    args = parse(argv)
    config = load_config(args.dataset, backbone=args.backbone, settings=args.set)
    config.data.root = args.root or config.data.root
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers is a number of processes from 0 on, not {args.workers}.")
    ranks = Ranks()
    device = pick_device(args.device, ranks.local)
    workers = usable_cores() // ranks.neighbors if args.workers is None else args.workers
    source = make_source(config)
    backbone = None
    todo = []  # every split is looked at before any is encoded
    for split in dict.fromkeys(args.splits or [config.data.train_split, config.data.eval_split]):
        listing = ranks.in_turn(functools.partial(list_split, source, split, args.on_error))
        folder = cache_folder(config.dataset, config.backbone, split)
        if listing.embeddings is not None and args.features == "pooled":
            raise UserError(f"'{config.dataset}' has embeddings alone, no pooled features: cache them without.")
        wanted = identity(config, split, source, listing, args.features)
        if ranks.told(ranks.first and finished(folder, wanted, args)):
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
    ranks.close()


if __name__ == "__main__":
    main()
