"""What training costs by the number of pairs, in memory and from disk, and whether shuffling in blocks does harm.

    python -m benchmarks.scale size --pairs 100000 1000000 12000000 --figure docs/scale.png
    python -m benchmarks.scale shuffle
    python -m benchmarks.scale evaluation --pairs 4000 8000 16000
    python -m benchmarks.scale parts --pairs 40000 400000

`size` writes caches of random embeddings (2 kB a pair at D = 512, deleted afterwards), and measures steps of train.py:
CPU seconds, pairs a second, and the peak of anonymous memory, which unlike the page cache cannot be given up. `shuffle`
trains on drawn pairs that are sorted by class, by a full shuffle and in blocks, and judges all on the same held-out
pairs. `evaluation` times eval.py. `parts` caches 400 files in clip-retrieval's layout, as LAION-400M has, where they
are, and reads an epoch of them. All work in the folder --folder. RESULTS.md and docs/scale.md record results.
"""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import cache_embeddings
import eval as evaluation
import train
from datasets import streaming
from datasets.embeddings import LAYOUT, Pairs
from datasets.streaming import InMemory, OnDisk
from metrics.retrieval import rank, recall_at
from models.base import adapt_all
from utils.arguments import make_parser
from utils.checkpoint import Run
from utils.config import HOME, load_backbone, load_config
from utils.errors import exits_cleanly
from utils.files import save_array, write_json

PART = 2**16  # rows that are written at once
FIRST, STEPS = 4, 24  # steps before the measured ones, and of these
FLAGS = ["--dataset", "embeddings", "--method", "asymvlm-psd", "--quiet", "--device", "cpu"]


def write_pairs(split, dim, parts, count, named=False):
    """Write the cache of a split, one caption an image, from parts (n, D), (n, D) of `count` pairs.

    named: with a caption for each, which evaluation reads.
    """
    folder = Path("embeddings/embeddings/given", split)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{side}.npy", "wb")) for side in ("image", "text")]
        for file in files:
            header = {"descr": "<f2", "fortran_order": False, "shape": (count, dim)}
            np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            for file, rows in zip(files, part, strict=True):
                file.write(np.ascontiguousarray(rows, dtype="<f2").data)
    for name in ("image_of_text", "image_id", "text_id"):
        save_array(folder / f"{name}.npy", np.arange(count))
    with open(folder / "items.jsonl", "w") as items:  # which training does not read
        for kind in ("image", "text"):
            rows = range(count if named else 0)
            items.writelines(f'{{"kind": "{kind}", "value": "{kind} {row}"}}\n' for row in rows)
    meta = {
        "layout": LAYOUT, "dataset": "embeddings", "split": split, "backbone": "given", "features": "final",
        "encoder": vars(load_backbone("given")), "id_space": split, "precision": "given", "dim": dim,
        "fingerprint": split, "encoder_fingerprint": "random", "images": count, "captions": count, "skipped": 0,
        "captions_cut": 0, "unreadable": 0, "logit_scale": 100.0, "logit_bias": None, "complete": True,
        "files": sorted(path.name for path in folder.iterdir() if path.name != "meta.json"),
    }  # fmt: skip
    write_json(folder / "meta.json", meta)


def random_parts(count, dim, seed=0):
    """Parts of random pairs that agree in every other dimension; the same rows again after PART of them, as drawing
    24 GB takes longer than to train on them does.
    """
    image, text = np.random.default_rng(seed).standard_normal((2, min(PART, count), dim), dtype=np.float32)
    text[:, ::2] = image[:, ::2]
    image, text = image.astype(np.float16), text.astype(np.float16)
    for start in range(0, count, PART):
        yield image[: count - start], text[: count - start]


class Watched:
    """The peak of this process's anonymous memory, in bytes, while the block runs."""

    def __enter__(self):
        self.peak, self.ends = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.ends.wait(0.02):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_):
        self.ends.set()
        self.thread.join()


def anonymous():
    """Bytes of anonymous memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def one_size(split, in_memory):
    """Train STEPS steps of train.py on a split, and end: a dict of figures."""
    figures, marks, taken = {}, [], []
    for kind in (InMemory, OnDisk):

        def watched(self, order, batch, first=0, batches=kind.batches):
            for item in batches(self, order, batch, first):
                if len(taken) in (0, FIRST, FIRST + STEPS):
                    marks.append((time.perf_counter(), time.process_time()))
                if len(taken) == FIRST + STEPS:
                    figures["batch"] = batch
                    signal.raise_signal(signal.SIGTERM)
                taken.append(batch)
                yield item

        kind.batches = watched
    start = time.perf_counter(), time.process_time()
    with Watched() as memory, contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        choice = ["--set", f"data.train_split={split}", f"train.in_memory={str(in_memory).lower()}"]
        train.main([*FLAGS, "--tag", "memory" if in_memory else "disk", "--overwrite", *choice])
    wall, cpu = ((b - a) / STEPS for a, b in zip(*marks[1:], strict=True))
    figures |= {"before_wall": marks[0][0] - start[0], "before_cpu": marks[0][1] - start[1]}
    return figures | {"wall": wall, "cpu": cpu, "peak": memory.peak}


def reader(split, windows=2):
    """Pairs a second, by wall and by CPU time, that a cache gives without any training, from disk."""
    data, batch = OnDisk(Pairs("embeddings", "given", split), torch.device("cpu")), 2048
    torch.manual_seed(1)
    order = data.order(torch.arange(len(data.text)), batch)[: windows * streaming.WINDOW]
    start = time.perf_counter(), time.process_time()
    count = sum(len(chosen) for chosen, _ in data.batches(order, batch))
    return {
        "reader_wall": count / (time.perf_counter() - start[0]),
        "reader_cpu": count / (time.process_time() - start[1]),
    }


def sizes(counts, largest_in_memory):
    """Figures of each size, in memory (where that is not too large) and from disk: {pairs: {in_memory: dict}}."""
    results = {}
    for count in counts:
        split = f"random{count}"
        started = time.perf_counter()
        write_pairs(split, 512, random_parts(count, 512), count)
        print(f"{count:,} pairs written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        results[count] = {}
        for in_memory in [True, False] if count <= largest_in_memory else [False]:
            command = [sys.executable, "-m", "benchmarks.scale", "one", "--split", split, "--folder", "."]
            command += ["--in-memory"] if in_memory else []
            paths = os.pathsep.join([str(HOME), os.environ.get("PYTHONPATH", "")])
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
            if done.returncode:
                raise RuntimeError(done.stderr)
            results[count][in_memory] = json.loads(done.stdout.splitlines()[-1])
        results[count][False] |= reader(split)
        shutil.rmtree(Path("embeddings/embeddings/given", split))
        shutil.rmtree("checkpoints", ignore_errors=True)
        for in_memory, figures in results[count].items():
            print(count, "in memory" if in_memory else "from disk", json.dumps(figures), flush=True)
    return results


def draw(results, path):
    """Draw the cost against the number of pairs: memory, CPU time of a step, seconds before the first step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    labels = "peak of anonymous memory (GB)", "pairs a second of CPU time", "before the first step (s)"
    values = [
        lambda one: one["peak"] / 1e9,
        lambda one: one["batch"] / one["cpu"],
        lambda one: one["before_wall"],
    ]
    for panel, label, value in zip(panels, labels, values, strict=True):
        for in_memory, look in ((True, "o--"), (False, "s-")):
            points = [(count, value(of[in_memory])) for count, of in results.items() if in_memory in of]
            panel.plot(*zip(*points), look, label="in memory" if in_memory else "from disk", ms=4)
        panel.set(xscale="log", xlabel="pairs, D = 512", ylabel=label)
    counts = list(results)
    panels[0].plot(counts, [2048 * count / 1e9 for count in counts], ":", color="gray", label="embeddings on disk")
    panels[0].set(yscale="log")
    panels[1].set(ylim=(0, 1.1 * panels[1].dataLim.ymax))  # room for the top marker
    panels[2].set(yscale="log")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def drawn_pairs(count, dim, classes, seed):
    """Pairs (N, D), (N, D) of classes, sorted by class, whose captions a linear map brings nearer to their images."""
    generator = torch.Generator().manual_seed(seed)
    centre, turn = (torch.randn(size, dim, generator=generator) for size in (classes, dim))
    label = torch.arange(count) * classes // count
    content = centre[label] + 0.7 * torch.randn(count, dim, generator=generator)
    image, noise = content + 0.5 * torch.randn(2, count, dim, generator=generator)
    text = content + 0.05 * content @ turn + noise - content
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def judged(tag, seed, held_out):
    """InfoNCE of held-out pairs at the temperature that suits it, R@1 of their captions, and the log of training."""
    run = Run(load_config("embeddings", "asymvlm-psd", tag=tag, seed=seed))
    adaptor, *_ = run.load("cpu")
    rows = torch.arange(len(held_out.text))
    loss, _ = train.validate(adaptor, InMemory(*held_out.to("cpu")), rows.split(1000))
    image = adapt_all(adaptor.adapt_image, held_out.image, "cpu")
    text = adapt_all(adaptor.adapt_text, held_out.text, "cpu")
    ranking = rank(lambda part: adaptor.log_likelihood(image, text.rows(part)).T, len(rows), rows, rows)
    return {"loss": loss, "recall": 100 * float(recall_at(ranking, 1).mean())}


def shuffles(pairs, seeds, epochs):
    """Judge trainings by order of pairs: a full shuffle, and blocks of several sizes in windows of a twelfth."""
    dim, classes, batch = 32, 100, 1024
    image, text = drawn_pairs(pairs + 4000, dim, classes, 0)
    out = torch.zeros(len(image), dtype=torch.bool)
    out[torch.randperm(len(image), generator=torch.Generator().manual_seed(1))[:4000]] = True
    for split, mask in (("sorted", ~out), ("held", out)):
        write_pairs(split, dim, [(image[mask].half().numpy(), text[mask].half().numpy())], int(mask.sum()))
    held_out = Pairs("embeddings", "given", "held")
    streaming.WINDOW = pairs // 12
    orders = {"full shuffle": None} | {f"blocks of {size}": size for size in (2, 8, 256, 2048)}
    orders["none: in the order of the file"] = pairs
    print(f"{pairs:,} pairs in {classes} classes, windows of {streaming.WINDOW:,}, batches of {batch}")
    full = None
    for title, block in orders.items():
        values = []
        for seed in range(seeds):
            streaming.BLOCK = block or 1
            if block == pairs:
                streaming.OnDisk.order = lambda self, rows, batch: rows
            tag = title.replace(" ", "").replace(":", "")
            settings = [
                f"train.epochs={epochs}",
                f"train.batch_size={batch}",
                "data.train_split=sorted",
                "train.min_steps=1",
            ]
            settings += ["model.width=64", "optim.name=adamw", "optim.lr=2e-3", "train.val_fraction=0"]
            settings += [f"train.in_memory={'false' if block else 'true'}"]
            with contextlib.redirect_stdout(io.StringIO()):
                train.main([*FLAGS, "--tag", tag, "--seed", str(seed), "--set", *settings])
            values.append(judged(tag, seed, held_out))
        full, cells = full or values, []
        for name in ("loss", "recall"):
            of, less = [value[name] for value in values], [b[name] - a[name] for a, b in zip(full, values, strict=True)]
            cells += [f"{statistics.mean(of):.3f} ± {statistics.stdev(of):.3f}"]
            cells += [f"{statistics.mean(less):+.3f} ± {statistics.stdev(less) / math.sqrt(seeds):.3f}"]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def evaluations(counts):
    """Time eval.py by the number of pairs, in CPU seconds, with the peak of its anonymous memory."""
    write_pairs("learn", 512, random_parts(5_000, 512), 5_000)
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(
            [*FLAGS, "--set", "data.train_split=learn", "train.epochs=1", "train.val_fraction=0", "train.min_steps=1"]
        )
    for count in counts:
        write_pairs("judge", 512, random_parts(count, 512, 1), count, named=True)
        start = time.process_time()
        with Watched() as memory, contextlib.redirect_stdout(io.StringIO()):
            evaluation.main([*FLAGS, "--split", "judge", "--allow-leakage"])
        print(f"{count:,} pairs: {time.process_time() - start:.1f} CPU s, {memory.peak / 1e9:.2f} GB", flush=True)


def parts(counts):
    """Cache folders of 400 parts in clip-retrieval's layout, and read all their training pairs, shuffled."""
    for count in counts:
        rows = count // 400
        for kind, array in zip(("img_emb", "text_emb"), next(random_parts(rows, 512)), strict=True):
            Path("laion", kind).mkdir(parents=True)
            for number in range(400):
                np.save(f"laion/{kind}/{kind}_{number:03d}.npy", np.roll(array, number, axis=1))
        start = time.perf_counter(), time.process_time(), anonymous()
        with Watched() as memory, contextlib.redirect_stdout(io.StringIO()):
            cache_embeddings.main(["--dataset", "embeddings", "--root", "laion", "--splits", "train0", "--quiet"])
        cpu, peak = time.process_time() - start[1], memory.peak - start[2]
        wall = time.perf_counter() - start[0]
        pairs, folder = Pairs("embeddings", "given", "train0"), Path("embeddings/embeddings/given/train0")
        disk = sum(path.stat().st_size for path in folder.iterdir())
        figures = {"cached": len(pairs.text), "wall": wall, "cpu": cpu, "peak": peak, "disk": disk}
        print(count, json.dumps(figures | reader("train0", windows=10)), flush=True)
        shutil.rmtree("laion")
        shutil.rmtree("embeddings")


@exits_cleanly()
def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=["size", "shuffle", "evaluation", "parts", "one"])
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path("scale"), help="where to write caches")
    parser.add_argument("--largest-in-memory", type=int, default=1_000_000, help="of the sizes also trained in memory")
    parser.add_argument("--figure", type=Path, help="where to draw `size`")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--split", help="of `one`, which `size` starts")
    parser.add_argument("--in-memory", action="store_true", help="of `one`")
    args = parser.parse_args(argv)
    figure = args.figure and args.figure.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)
    if args.what == "one":
        print(json.dumps(one_size(args.split, args.in_memory)))
    elif args.what == "shuffle":
        shuffles(args.pairs[0], args.seeds, args.epochs)
    elif args.what in ("evaluation", "parts"):
        {"evaluation": evaluations, "parts": parts}[args.what](args.pairs)
    else:
        results = sizes(args.pairs, args.largest_in_memory)
        if figure:
            draw(results, figure)


if __name__ == "__main__":
    main()
