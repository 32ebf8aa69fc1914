"""Encode a data set's images and captions with a frozen vision-language model, once.

    python cache_embeddings.py --dataset coco --root /data/coco
    python cache_embeddings.py --dataset shapes
    python cache_embeddings.py --dataset embeddings --root pairs.npz

writes embeddings/<dataset>/<backbone>/<split>/. A killed run goes on where it stopped; a finished split is left alone.
"""

from datasets.embeddings import cache_folder, identity, read_meta, write_cache, write_given
from utils.arguments import add_data_flags, make_parser
from utils.config import load_config, make_source
from utils.device import pick_device
from utils.errors import GOES_ON, UserError, exits_cleanly
from utils.files import locked


def parse(argv):
    parser = make_parser(__doc__)
    add_data_flags(parser, "what to encode")
    parser.add_argument("--root", help="folder of the raw data, in its publisher's layout, or the file of embeddings")
    parser.add_argument("--splits", nargs="+", help="which splits; by default the ones trained and evaluated on")
    on_error = "at an image that is missing or cannot be read: stop, or leave it and its captions out"
    parser.add_argument("--on-error", choices=["stop", "skip"], default="stop", help=on_error)
    parser.add_argument("--overwrite", action="store_true", help="replace a cache that holds something else")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override any configuration key")
    return parser.parse_args(argv)


def read_split(source, split, on_error):
    """List a split and leave out, where told to, images whose files are absent and captions without a word."""
    images, captions, matches = source.images(split), source.captions(split), source.matches(split)
    embeddings = source.embeddings(split)
    absent = {image.id: image.path for image in images if image.path is not None and not image.path.is_file()}
    empty = {caption.id for caption in captions if not caption.text.strip()}
    if absent and on_error == "stop":
        first = next(iter(absent.values()))
        raise UserError(
            f"{len(absent):,} of the {len(images):,} images of '{split}' are absent from {first.parent} (the first is"
            f" {first.name}): complete the folder, or leave them and their captions out with --on-error skip."
        )
    if empty and on_error == "stop":
        raise UserError(f"caption {min(empty)} of '{split}' is empty: mend it, or leave it out with --on-error skip.")
    keep_text = [caption.image_id not in absent and caption.id not in empty for caption in captions]
    described = {caption.image_id for caption, keep in zip(captions, keep_text) if keep}
    keep_image = [image.id in described for image in images]
    skipped = [{"image_id": id, "path": str(path), "reason": "absent"} for id, path in absent.items()]
    skipped += [{"text_id": id, "reason": "empty caption"} for id in sorted(empty)]
    # An image that nothing describes can be no query and no answer.
    silent = [image for image in images if image.id not in described and image.id not in absent]
    skipped += [{"image_id": image.id, "path": image.place, "reason": "no caption"} for image in silent]
    return {
        "images": [image for image, keep in zip(images, keep_image) if keep],
        "captions": [caption for caption, keep in zip(captions, keep_text) if keep],
        "embeddings": None if embeddings is None else (embeddings[0][keep_image], embeddings[1][keep_text]),
        "matches": None if matches is None else matches[keep_image][:, keep_text],
        "chains": source.chains(split),
        "skipped": skipped,
    }


def describe(folder):
    """Say in a line what a cache holds."""
    meta = read_meta(folder)
    skipped = f", {meta['skipped']:,} left out (skipped.jsonl)" if meta["skipped"] else ""
    return f"{folder}: {meta['images']:,} images, {meta['captions']:,} captions, D = {meta['dim']}{skipped}"


@exits_cleanly(interrupted=GOES_ON)
def main(argv=None):
    args = parse(argv)
    config = load_config(args.dataset, backbone=args.backbone, settings=args.set)
    config.data.root = args.root or config.data.root
    device = pick_device(args.device)
    source = make_source(config)
    backbone = None
    for split in args.splits or [config.data.train_split, config.data.eval_split]:
        folder = cache_folder(config.dataset, config.backbone, split)
        content = read_split(source, split, args.on_error)
        if not content["captions"]:
            raise UserError(f"nothing is left to cache of '{split}': none of its images are in {config.data.root}.")
        wanted = identity(config, split, source, content["images"], content["captions"])
        with locked(folder):
            if (folder / "meta.json").is_file():
                held = read_meta(folder)
                if held["fingerprint"] == wanted["fingerprint"]:
                    print(f"{describe(folder)} (already there)")
                    continue
                if not args.overwrite:
                    same = held["encoder_fingerprint"] == wanted["encoder_fingerprint"]
                    changed = "list of pairs" if same else "backbone"
                    raise UserError(
                        f"{folder} was made with another {changed} than asked for: replace it with --overwrite."
                    )
            if content["embeddings"] is not None:
                write_given(folder, wanted, content, source)
            else:
                if backbone is None:
                    from models.backbone import Backbone  # takes seconds to import, and a second run needs none of it

                    backbone = Backbone(config.encoder, device)
                write_cache(folder, wanted, content, backbone, args.on_error, args.quiet)
        print(describe(folder))


if __name__ == "__main__":
    main()
