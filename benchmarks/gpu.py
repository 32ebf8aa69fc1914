"""What a GPU makes of COCO's size, on synthetic clustered embeddings: `python -m benchmarks.gpu` (make bench-gpu).

118,287 images with five captions each, D = 512, batches of 2,048. Every method trains some epochs, from which 200 are
extrapolated without the first; AsymVLM in every precision, eager and compiled (train.compile=true: CUDA graphs), and
beside it the textbook loop: a DataLoader, and a loss on the matrix of scores. Then the loss of 131,072 pairs, several
seeds in processes side by side, and an evaluation of 5,000 images with 25,000 captions. --small does the same in
seconds on any device. RESULTS.md records results; none is of a GPU yet.
"""

import argparse
import contextlib
import csv
import io
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import cache_embeddings
import eval as evaluation
import train
from benchmarks.measure import machine, peak_growth, seconds
from benchmarks.speed.pair_loss import info_nce
from grid.workers import Workers
from models.base import perceptron
from models.distributions import von_mises_fisher
from utils.config import load_config
from utils.device import pick_device
from utils.errors import UserError, exits_cleanly

EPOCHS, DIM, BATCH = 200, 512, 2048
METHODS = ("asymvlm-vmf", "symmetric-vmf", "probvlm", "pfe", "pcmepp", "prolip", "loss-prediction")
PRECISIONS = ("float32", "tf32", "bfloat16")


class Size(NamedTuple):
    """How much is measured."""

    images: int = 118_287
    tested: int = 5000  # images
    epochs: int = 40
    batches: int = 20  # of the textbook loop, beyond two
    pairs: int = 131_072  # of the large loss
    settings: tuple = ()


SMALL = Size(images=200, tested=40, epochs=3, batches=2, pairs=512, settings=("train.batch_size=256", "model.width=32"))


def clustered(images, device, per_image=5, clusters=1000):
    """Embeddings of images (N, D), float16, around centers, and of five captions each around their image."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, device=device)

    centers = normal(clusters, DIM)
    image = F.normalize(centers[torch.arange(images, device=device) % clusters] + normal(images, DIM), dim=-1)
    text = [part.repeat_interleave(per_image, dim=0) for part in image.split(8192)]
    text = torch.cat([F.normalize(part + 2 * normal(*part.shape) / DIM**0.5, dim=-1).half().cpu() for part in text])
    return image.half().cpu().numpy(), text.numpy()


def make_cache(size, device):
    """Write the embeddings, and cache them as splits `train` and `test` of the data set `embeddings`."""
    count = size.images + size.tested
    image, text = clustered(count, device)
    split = np.where(np.arange(count) < size.images, "train", "test")
    np.savez("pairs.npz", image=image, text=text, image_of_text=np.arange(len(text)) // 5, split=split)
    quiet(cache_embeddings.main, "--dataset", "embeddings", "--root", "pairs.npz", "--splits", "train", "test")
    os.unlink("pairs.npz")


def quiet(main, *flags):
    with contextlib.redirect_stdout(io.StringIO()):
        main([*flags, "--quiet"])


def flags_of(size, method, device, tag, settings, seed=0):
    """The flags of a run of train.py."""
    always = ("data.train_split=train", f"train.epochs={size.epochs}", "train.val_fraction=0", *size.settings)
    run = ["--dataset", "embeddings", "--method", method, "--seed", str(seed), "--tag", tag, "--device", str(device)]
    return [*run, "--set", *always, *settings]


def per_epoch(method, tag, seed=0):
    """Seconds of an epoch of a finished run, without the first, in which libraries warm up."""
    log = load_config("embeddings", method, tag=tag, seed=seed).checkpoint / "log.csv"
    taken = [float(row["seconds"]) for row in csv.DictReader(log.read_text().splitlines())]
    return (taken[-1] - taken[0]) / (len(taken) - 1)


def trained(size, method, device, tag, *settings):
    """Train, and print how long 200 epochs take, or why the device cannot."""
    try:
        # No --quiet after --set, which would take it for a setting.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            train.main(["--quiet", *flags_of(size, method, device, tag, settings)])
    except SystemExit:  # for example a GPU without TF32
        print(f"| {method} | {tag} | {errors.getvalue().strip()} | |", flush=True)
        return
    taken = per_epoch(method, tag)
    print(f"| {method} | {tag} | {1000 * taken:,.0f} ms | {EPOCHS * taken:,.0f} s |", flush=True)


def textbook(size, device):
    """Seconds of an epoch of von Mises-Fisher InfoNCE as a first script has it.

    On the line through a short and a longer epoch, as processes of the DataLoader start once an epoch, not a batch.
    """
    folder = next(Path("embeddings").glob("**/train"))
    image, text = (torch.from_numpy(np.load(folder / f"{name}.npy")).float() for name in ("image", "text"))
    short, long = 2, 2 + size.batches
    batch = min(BATCH, len(text) // long)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(text)

        def __getitem__(self, index):
            return image[index // 5], text[index]

    model = perceptron(DIM, 1024, DIM, 3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def epoch(batches):
        order = torch.randperm(len(text))[: batches * batch].tolist()
        for x, y in torch.utils.data.DataLoader(Rows(), batch_size=batch, sampler=order, num_workers=2):
            x, y = x.to(device), y.to(device)
            eta = model(y)
            kappa = eta.norm(dim=-1)
            score = x @ eta.T + von_mises_fisher.log_normalizer(kappa, DIM)
            target = torch.arange(len(x), device=device)
            loss = (F.cross_entropy(score, target) + F.cross_entropy(score.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    epoch(short)
    first, second = (seconds(lambda count=count: epoch(count), device) for count in (short, long))
    return first + (second - first) * (len(text) / batch - short) / size.batches


def side_by_side(size, device, seeds):
    """Seconds of an epoch of one process, and the longest of as many as there are seeds at once."""
    settings = ("train.precision=bfloat16",) if device.type == "cuda" else ()
    longest = []
    for tag, count in (("alone", 1), ("together", seeds)):
        runs = [flags_of(size, "asymvlm-psd", device, tag, settings, seed) for seed in range(count)]
        with Workers([str(device)] * count) as workers:
            jobs = {f"seed {seed}": [("train", ["--quiet", *run])] for seed, run in enumerate(runs)}
            for name, failures in workers.run(jobs, lambda: None):
                if failures:
                    raise UserError(f"{name}: {' '.join(failures)}")
        longest.append(max(per_epoch("asymvlm-psd", tag, seed) for seed in range(count)))
    return longest


def measure(size, device, seeds):
    """Print every figure."""
    started = time.perf_counter()
    make_cache(size, device)
    print(f"embeddings made and cached in {time.perf_counter() - started:.0f} s\n", flush=True)
    print(f"| method | | an epoch | {EPOCHS} epochs |\n|:--|:--|--:|--:|", flush=True)
    best = "tf32" if device.type == "cuda" else "float32"
    for precision in PRECISIONS if device.type == "cuda" else ["float32", "bfloat16"]:
        for compiled in (False, True) if device.type == "cuda" else (False,):
            settings = f"train.precision={precision}", f"train.compile={str(compiled).lower()}"
            tag = f"{precision}{'-compiled' if compiled else ''}"
            trained(size, "asymvlm-psd", device, tag, *settings)
    taken = textbook(size, device)
    print(f"| the textbook loop, vmf | float32 | {1000 * taken:,.0f} ms | {EPOCHS * taken:,.0f} s |", flush=True)
    for method in METHODS:
        trained(size, method, device, best, f"train.precision={best}")
    case = info_nce(device, "power spherical", size.pairs)
    memory, taken = peak_growth(case.ours, device), seconds(case.ours, device)
    print(f"\nThe loss of {size.pairs:,} pairs with gradients: {taken:.2f} s, {memory:,.0f} MB.", flush=True)
    if seeds > 1:
        alone, together = side_by_side(size, device, seeds)
        print(f"{seeds} seeds side by side take {together / alone:.1f} times as long as one.", flush=True)
    flags = ["--dataset", "embeddings", "--method", "asymvlm-psd", "--tag", "float32", "--split", "test"]
    taken = seconds(lambda: quiet(evaluation.main, *flags, "--device", str(device)), device)
    print(f"eval.py of {size.tested:,} images and {5 * size.tested:,} captions: {taken:.1f} s.")


@exits_cleanly()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="the same in seconds, on any device")
    parser.add_argument("--seeds", type=int, default=5, help="that train side by side")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if device.type == "cpu" and not args.small:
        raise UserError("there is no GPU here, and a CPU would take hours: try --small, which takes seconds.")
    print(machine(device), flush=True)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            measure(SMALL if args.small else Size(), device, args.seeds)
        finally:
            os.chdir(before)


if __name__ == "__main__":
    main()
