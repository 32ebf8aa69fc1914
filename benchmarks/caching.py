"""Where the time of caching goes: `python -m benchmarks.caching [--images FOLDER] [--backbone NAME]`.

Measures decoding, the transform and the encoders each alone, then caching as a whole beside a textbook loop in the same
run: one process that opens, transforms and encodes batch by batch, with captions padded to 77 tokens. The parts show
what bounds the whole, and how many workers keep the encoder busy.
"""

import argparse
import copy
import functools
import io
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torchvision.transforms as T

from benchmarks.measure import machine, medians
from datasets import Caption, Image, Source
from datasets.blocks import BlockEncoder, Blocks
from datasets.ranks import Ranks
from models.backbones import make_backbone
from utils.config import load_backbone
from utils.device import pick_device, usable_cores

CAPTION = "two dogs run over a green field in the rain, number {}"
REPEATS = 3


class Folder(Source):
    """Image files with one caption each."""

    def __init__(self, files):
        self.files = files

    def images(self, split):
        return [Image(row, file) for row, file in enumerate(self.files)]

    def captions(self, split):
        return [Caption(row, row, CAPTION.format(row)) for row in range(len(self.files))]


def photographs(folder, count):
    """Save smooth noise as JPEGs of COCO's size, 640 x 480 and about 100 kB, in place of real images."""
    rng = np.random.default_rng(0)
    for row in range(count):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (480, 640, 3))
        PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{row:06d}.jpg", quality=90)


def cached(source, backbone, workers, kind):
    """Encode all images or captions of a source into blocks, as cache_embeddings.py does."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = BlockEncoder(Blocks(Path(folder)), backbone, Ranks(), workers=workers, quiet=True)
        if kind == "images":
            encoder.images(source, source.images(""))
        else:
            encoder.texts("text", [caption.text for caption in source.captions("")])


def textbook(source, backbone, normalized, kind):
    """Encode as a first script does: open, transform, encode; captions padded to the window."""
    size = backbone.config.batch_size
    with torch.inference_mode():
        if kind == "images":
            images = source.images("")
            for start in range(0, len(images), size):
                batch = [normalized(PIL.Image.open(image.path)) for image in images[start : start + size]]
                backbone.model.encode_image(torch.stack(batch).to(backbone.device)).float().cpu()
        else:
            texts = [caption.text for caption in source.captions("")]
            for start in range(0, len(texts), size):
                tokens = backbone.tokenize(texts[start : start + size])
                backbone.model.encode_text(tokens.to(backbone.device)).float().cpu()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of JPEGs; by default random ones of COCO's size")
    parser.add_argument("--count", type=int, default=256, help="number of images")
    parser.add_argument("--backbone", default="ViT-B-32-random")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    config = load_backbone(args.backbone)
    config.precision, config.batch_size = args.precision, 64
    backbone = make_backbone(config, device)
    with tempfile.TemporaryDirectory() as folder:
        if args.images is None:
            photographs(Path(folder), args.count)
        files = sorted(Path(args.images or folder).glob("*.jpg"))[: args.count]
        measure(Folder(files), backbone, args.workers, device)


def measure(source, backbone, workers, device):
    files = [image.path for image in source.images("")]
    contents = [file.read_bytes() for file in files]
    sample = contents[:64]
    pictures = [PIL.Image.open(io.BytesIO(content)).convert("RGB") for content in sample]
    pixels = torch.stack([backbone.transform(picture) for picture in pictures])
    tokens = backbone.tokenize([CAPTION.format(row) for row in range(len(sample))])
    transform = backbone.transform

    mean, std = backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()
    normalized = T.Compose(
        [*transform.steps, lambda picture: picture.convert("RGB"), T.ToTensor(), T.Normalize(mean, std)]
    )

    def rate(call, count):
        call()
        return count / medians([call], device, REPEATS)[0]

    print(
        machine(device),
        f"{len(files)} JPEGs of {np.mean([len(c) for c in contents]) / 1000:.0f} kB,",
        "items per second:",
    )
    decode = rate(lambda: [PIL.Image.open(io.BytesIO(c)).convert("RGB") for c in sample], len(sample))
    print(f"  decode, one process             {decode:9.1f}")
    print(f"  transform, one process          {rate(lambda: [transform(p) for p in pictures], len(sample)):9.1f}")
    both = rate(lambda: [transform(PIL.Image.open(io.BytesIO(c))) for c in sample], len(sample))
    print(f"  both, one process               {both:9.1f}")
    encode = rate(lambda: backbone.encode_images(pixels), len(sample))
    print(f"  encode images                   {encode:9.1f}  ({backbone.config.model}, {backbone.precision})")
    print(f"  encode captions                 {rate(lambda: backbone.encode_tokens(tokens), len(sample)):9.1f}")
    for kind in ("images", "captions"):
        calls = (
            functools.partial(cached, source, backbone, workers, kind),
            functools.partial(textbook, source, backbone, normalized, kind),
        )
        ours, theirs = (len(files) / taken for taken in medians(calls, device, REPEATS))
        print(f"  whole, {kind:8}                 {ours:9.1f}  textbook loop {theirs:9.1f}: {ours / theirs:.1f} times")
    free = copy.copy(backbone)  # encodes at no cost
    free.encode_images = lambda pixels: torch.ones(len(pixels), backbone.dim)
    most = rate(lambda: cached(source, free, workers, "images"), len(files))
    share = 100 * most / (max(1, workers) * both)
    print(f"  whole, encoded at no cost       {most:9.1f}  {share:.0f} % of {max(1, workers)} x both")
    if device.type == "cpu":
        print("  The encoder shares the cores with the workers: the bound is the sum of both.")
    elif most < encode:
        print(f"  The bound is decoding; {encode / both:.0f} workers, and as many cores, would keep the encoder busy.")
    else:
        print("  The bound is the encoder.")


if __name__ == "__main__":
    main()
