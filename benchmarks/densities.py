"""Densities on the sphere against truths that are known, and as scores for what lies outside of the training data.

    python -m benchmarks.densities --figure densities.png

on the built-in `shapes`, which it caches in the current folder: Markdown tables of densities that are known, of
wrong answers, of out-of-distribution detection and of cost. Parts that are named run alone: `known`, `pairs`,
`answers`, `scenes`, `outside`, `cost`. Everything is measured on test; nothing was chosen on it. Intervals of 95 % draw
items; figures of several seeds are their means.
"""

import contextlib
import io
import math
import re
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cache_embeddings
import train
from datasets.bank import Bank, draw
from datasets.embeddings import Pairs
from datasets.ranks import Ranks
from datasets.shapes import ATTRIBUTES, NAMES, UNNAMED, VALUES
from datasets.streaming import InMemory
from metrics.comparison import PairedBootstrap
from metrics.retrieval import ambiguity
from metrics.uncertainty import auroc, auroc_of_draws, false_positive_rates, spearman
from models.backbones import make_backbone
from models.backbones.last_map import join
from models.base import Embedding, adapt_all
from models.density import SIDES, kernel
from models.distributions import PowerSpherical, VonMisesFisher
from models.distributions.sphere import log_surface_area
from models.distributions.von_mises_fisher import log_normalizer
from models.flow import Flow
from models.joint_flow import MASKS, JointFlow
from models.vmf_mixture import Mixture, VMFMixture, log_density
from reporting.words import NONE
from tasks import few_words, of_candidates
from tasks.retrieval import scenes
from utils.arguments import make_parser
from utils.checkpoint import Run
from utils.config import load_config, make_adaptor, make_source, needs_pooled
from utils.errors import exits_cleanly

PARTS = ("known", "pairs", "answers", "scenes", "outside", "cost")
DIMS, KNOWN = (3, 16, 64, 512), ("uniform", "von Mises-Fisher", "power spherical", "mixture")
ITEMS, ASKED, STEPS = 4000, 1000, 500  # of a density that is known: fitted, asked, and steps that train a flow
BANDWIDTHS = (5, 20, 80, 320, 1280, 5120)  # of kernels, chosen by held-out likelihood
METHODS = ("typicality", "knn", "kde", "vmf-mixture", "flow", "joint-flow")
FLOWS = ("flow", "joint-flow")  # which others are compared with
DRAWS, NOISE, CAPTIONS = 500, 500, 2000  # of the bootstrap; images of noise; captions of absent things
HIDDEN = tuple((shape, (3 * shape + 1) % 8) for shape in range(6))  # of shape and color, hidden from the training split
FADING = 0.7  # each value of shape and of color is so many times as frequent as the one before, in `scenes`
ABSENT = {  # wordings of what the drawn world lacks, by the attribute whose wording they replace
    "shape": ("hexagon", "elephant", "teapot", "spiral", "bicycle", "tree"),
    "color": ("maroon", "turquoise", "beige", "golden", "transparent"),
    "background": ("plaid", "floral", "snowy", "velvet", "rainy"),
}


class Split(NamedTuple):
    """Rows of `shapes` and their scenes."""

    pairs: Pairs
    scenes: np.ndarray  # (N, 5) value indices
    mentions: np.ndarray  # (M, 5) value indices or UNNAMED


@cache
def split(name):
    """The cached split of `shapes` of this name."""
    source = make_source(load_config("shapes"))
    return Split(Pairs("shapes", "shapes-tiny", name, pooled=True), source.scenes(name), source.mentions(name))


def ready(quiet):
    """Cache the splits that are asked, unless they are."""
    for dataset, splits in (("shapes", ("train", "test")), ("shapes-objects", ("shifted-test",))):
        flags = ["--dataset", dataset, "--features", "pooled", "--splits", *splits, *(["--quiet"] if quiet else [])]
        with contextlib.redirect_stdout(io.StringIO()):
            cache_embeddings.main(flags)


def fitted(method, rows, seed, quiet):
    """A method that has learned from the captions `rows` of shapes' train split and their images; CPU seconds."""
    started = time.process_time()
    config = load_config("shapes", method, seed=seed)
    pairs = split("train").pairs
    torch.manual_seed(seed)
    adaptor = make_adaptor(config, pairs.dim)
    adaptor.prepare(pairs, draw(pairs, rows, seed, needs_pooled(config)), quiet=True)
    if any(p.requires_grad for p in adaptor.parameters()):
        optimizer = train.make_optimizer(adaptor, config.optim)
        config.train.save_every = math.inf  # there is no run on disk
        data, run = InMemory(*pairs.to("cpu")), Run(config)
        run.resume = lambda: None
        with Ranks() as ranks:
            train.fit(adaptor, optimizer, data, torch.as_tensor(rows), [], run, ranks, lambda: False, quiet)
    return adaptor.eval(), time.process_time() - started


# Densities that are known.


def known(name, dim):
    """Samples (ITEMS + ASKED, D) of a density, and its logarithm at any items, in nats above the uniform density."""
    torch.manual_seed(dim)
    pole, count = F.normalize(torch.randn(4, dim, dtype=torch.float64), dim=-1), ITEMS + ASKED
    kappa = torch.full((4,), 3.0 * dim, dtype=torch.float64)
    if name == "mixture":
        mixture = Mixture(pole, kappa, torch.full_like(kappa, 0.25).log())
        rows = torch.randint(4, (count,))
        return VonMisesFisher(pole[rows], kappa[rows]).sample(), lambda x: log_density(x, mixture)
    family = PowerSpherical if name == "power spherical" else VonMisesFisher
    law = family(pole[0], 0 * kappa[0] if name == "uniform" else kappa[0])
    return law.sample((count,)), lambda x: law.log_prob(x) + log_surface_area(dim)


def kernel_density(x, bank, beta):
    """Log density (N,) by kernels on a bank, in nats above uniform."""
    return kernel(x, bank, beta) + log_normalizer(x.new_tensor(beta), x.shape[-1])


def bandwidth(x):
    """The bandwidth whose kernels on the first four fifths of x have the best log density of the rest."""
    cut = 4 * len(x) // 5
    return max(BANDWIDTHS, key=lambda beta: kernel_density(x[cut:], x[:cut], beta).mean().item())


def as_bank(x):
    """Items (N, D) as the images and the captions of a bank."""
    return Bank(x, x, torch.arange(len(x)), "drawn", torch.arange(len(x)))


class Scale(NamedTuple):
    """What `prepare` reads of a cache."""

    meta: dict


def trained(flow, lr, *sides):
    """Train a flow on random batches of images and captions (N, D), (N, D), in float32; ready to be asked."""
    optimizer = torch.optim.AdamW(flow.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(sides[0]), (256,))
        optimizer.zero_grad()
        flow.loss(*(side[rows].float() for side in sides)).backward()
        optimizer.step()
        schedule.step()
    return flow.eval()


def estimates(x, asked):
    """Log densities (N,) at `asked` (N, D), in nats above uniform, of what learned from x: {method: values}."""
    torch.manual_seed(0)
    dim, pairs = x.shape[1], Scale({"logit_scale": 1.0})
    mixture = VMFMixture(dim)
    mixture.prepare(pairs, as_bank(x))
    flow = trained(Flow(dim, width=128 if dim < 512 else 512), 3e-3 if dim < 512 else 1e-3, x, x)
    with torch.inference_mode():
        return {
            "kde": kernel_density(asked, x, bandwidth(x)),
            "vmf-mixture": mixture.log_density(asked, "image"),
            "flow": flow.log_density(asked.float(), "image").double(),
        }


def of_known(quiet):
    """Markdown: mean log density of the truth less that of each estimate, its s.d. over items, and the correlation."""
    lines = ["| D | density | true, nats above uniform | kde | vmf-mixture | flow |", "|--:|:--|--:|--:|--:|--:|"]
    for dim in DIMS:
        for name in tqdm(KNOWN, desc=f"D = {dim}", disable=quiet or None):
            x, truth = known(name, dim)
            wanted, cells = truth(x[ITEMS:]), []
            for values in estimates(x[:ITEMS], x[ITEMS:]).values():
                gap = wanted - values
                cell = f"{gap.mean():+.2f} ± {gap.std():.2f}"
                if name != "uniform":
                    cell += f", r = {torch.corrcoef(torch.stack([wanted, values]))[0, 1]:.3f}"
                cells.append(cell)
            lines.append(f"| {dim} | {name} | {wanted.mean():.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def known_pairs(dim):
    """Images that are uniform, captions von Mises-Fisher around them: samples, and log p(caption | image) of each.

    It is the log density of the pair, too, and its pointwise mutual information: both marginals are uniform.
    """
    torch.manual_seed(dim)
    count = ITEMS + ASKED
    image = F.normalize(torch.randn(count, dim, dtype=torch.float64), dim=-1)
    law = VonMisesFisher(image, torch.full((count,), 3.0 * dim, dtype=torch.float64))
    text = law.sample()
    return image, text, law.log_prob(text) + log_surface_area(dim)


def of_pairs(quiet):
    """Markdown: as `of_known`, of pairs by joint-flow: each density, and the pointwise mutual information."""
    names = [*MASKS, "mutual information", "chain rule"]
    lines = [f"| D | true, nats | {' | '.join(names)} |", "|--:|--:|" + "--:|" * len(names)]
    for dim in tqdm([dim for dim in DIMS if dim < 512], disable=quiet or None):
        image, text, truth = known_pairs(dim)
        torch.manual_seed(0)
        flow = trained(JointFlow(dim, width=128), 3e-3, image[:ITEMS], text[:ITEMS])
        asked, wanted = (image[ITEMS:].float(), text[ITEMS:].float()), truth[ITEMS:]
        with torch.inference_mode():
            ours = {name: flow.of_pairs(*asked, name).double() for name in MASKS if name not in SIDES}
            ours |= {side: flow.log_density(x, side).double() for side, x in zip(SIDES, asked, strict=True)}
        ours["mutual information"] = ours["text given image"] - ours["text"]
        cells = []
        for name in names[:-1]:
            gap = (0 if name in SIDES else wanted) - ours[name]
            cells.append(f"{gap.mean():+.2f} ± {gap.std():.2f}")
            if name not in SIDES:
                cells[-1] += f", r = {torch.corrcoef(torch.stack([wanted, ours[name]]))[0, 1]:.3f}"
        rule = ours["pair"] - ours["image"] - ours["text given image"]
        lines.append(f"| {dim} | {wanted.mean():.2f} | {' | '.join(cells)} | {rule.abs().mean():.2f} |")
    return "\n".join(lines)


# Wrong answers before and after the search.


def of_answers(seeds, quiet):
    """Markdown: AUROC of wrong answers, Spearman with true ambiguity, means over seeds; knn less each."""
    test = split("test").pairs
    rows, scene = np.arange(len(split("train").pairs.text)), scenes(test)
    unit = {side: F.normalize(queries(side, test), dim=-1) for side in SIDES}
    cosines = unit["text"] @ unit["image"].T
    best, owner = cosines.argmax(dim=1), test.image_of_text
    hit = {
        "text": best.numpy() == owner,
        "image": owner[cosines.argmax(dim=0).numpy()] == np.arange(len(unit["image"])),
    }
    drawn = {"text": PairedBootstrap(scene[owner]), "image": PairedBootstrap(scene)}
    entropy = torch.special.entr((test.meta["logit_scale"] * cosines).softmax(dim=1)).sum(dim=1)
    values = {("few words", "text"): [few_words(test.items["text"])], ("entropy", "text"): [entropy.double().numpy()]}
    for seed in seeds:
        for method in METHODS:
            adaptor, _ = fitted(method, rows, seed, quiet)
            for side in SIDES:
                values.setdefault((method, side), []).append(uncertainty(adaptor, side, queries(side, test)))
            if method == "joint-flow":
                text, image = Embedding(unit["text"]), Embedding(unit["image"])
                information = of_candidates(adaptor, "text", text, image, best.numpy()[:, None], quiet)["information"]
                values.setdefault((f"{method}, mutual information", "text"), []).append(information)
    area = {key: np.mean([auroc(each, hit[key[1]]) for each in of_seeds]) for key, of_seeds in values.items()}
    draws = {
        key: np.mean([drawn[key[1]].auroc(each, hit[key[1]]) for each in of_seeds], axis=0)
        for key, of_seeds in values.items()
    }
    truth = ambiguity(test.matches)
    head = "| uncertainty | Spearman with ambiguity | text→image | image→text | knn less it, text→image | image→text |"
    lines = [head, "|:--|--:|--:|--:|--:|--:|"]
    for name in dict.fromkeys(name for name, _ in values):
        correlation = [spearman(each, truth) for each in values[name, "text"]]
        cells = [f"{np.mean(correlation):.3f} ± {np.std(correlation):.3f}"]
        for side in ("text", "image"):
            key = name, side
            cells.append(f"{area[key]:.3f} {interval(draws[key])}" if key in area else NONE)
        for side in ("text", "image"):
            key, rival = (name, side), ("knn", side)
            has = key in area and name != "knn"
            gap = f"{area[rival] - area[key]:+.3f} {interval(draws[rival] - draws[key])}" if has else ""
            cells.append(gap)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# A world whose scenes have known frequencies.


def interval(values):
    """Mean and interval of 95 % of figures of draws, as text."""
    return f"[{np.quantile(values, 0.025):.3f}, {np.quantile(values, 0.975):.3f}]"


def drawn_spearman(a, b):
    """Spearman's correlation and its interval over draws of items, as text."""
    rng, count = np.random.default_rng(0), len(a)
    rows = [rng.integers(count, size=count) for _ in range(DRAWS)]
    return f"{spearman(a, b):.3f} {interval([spearman(a[row], b[row]) for row in rows])}"


def density_of(adaptor, side, rows):
    """Of queries (N, D): the log density where the method has one, else its uncertainty, which rises with it."""
    with torch.inference_mode():
        values = adaptor.log_density(rows, side)
        return (adaptor.uncertainty(rows, side) if values is None else values).numpy()


def uncertainty(adaptor, side, rows):
    """Uncertainties (N,) of queries (N, D)."""
    return adapt_all(getattr(adaptor, f"adapt_{side}"), rows.numpy(), "cpu").uncertainty.double().numpy()


def queries(side, pairs):
    """Queries (N, D) of a cache."""
    return torch.from_numpy(np.array(getattr(pairs, side)[:])).float()


def of_scenes(quiet):
    """Markdown: of test images, Spearman of each density with the true frequency of their scene in training."""
    part, rng = split("train"), np.random.default_rng(0)
    frequency = lambda scenes: FADING ** scenes[:, :2].sum(axis=1)  # noqa: E731
    kept = np.flatnonzero(rng.random(len(part.scenes)) < frequency(part.scenes))
    rows = np.flatnonzero(np.isin(part.pairs.image_of_text, kept))
    test = split("test")
    lines = ["| method | images: frequency of the scene |", "|:--|--:|"]
    for method in METHODS:
        skewed, _ = fitted(method, rows, 0, quiet)
        image = density_of(skewed, "image", queries("image", test.pairs))
        lines.append(f"| {method} | {drawn_spearman(image, frequency(test.scenes))} |")
    return "\n".join(lines)


# Out of distribution.


class Outside(NamedTuple):
    """Queries of one modality: some like the training data, the others not."""

    side: str
    title: str
    inside: Tensor  # (N, D + P) with the pooled features
    outside: Tensor  # (M, D + P)


def hidden(values):
    """Whether the shape and the color of scenes or mentions (N, 5) are a pair that is hidden from training."""
    return np.isin(values[:, 0] * 8 + values[:, 1], [8 * shape + color for shape, color in HIDDEN]) & (
        values[:, :2] != UNNAMED
    ).all(axis=1)


def noise(count):
    """Images (count, 3, 96, 96) of independent pixels, and of blurred ones, in turn; uint8."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(count):
        cells = 96 if number % 2 else int(rng.integers(4, 24))
        grid = PIL.Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        images.append(grid.resize((96, 96), PIL.Image.Resampling.BICUBIC))
    return images


def renamed(texts, mentions):
    """Captions that name a shape, a color or a background, (rows, new texts): with a wording that the world lacks."""
    rng, rows, changed = np.random.default_rng(0), [], []
    for row, (text, mention) in enumerate(zip(texts, mentions, strict=True)):
        named = [name for name in ABSENT if mention[NAMES.index(name)] != UNNAMED]
        if not named:
            continue
        name = named[rng.integers(len(named))]
        value = VALUES[NAMES.index(name)][mention[NAMES.index(name)]]
        wordings = "|".join(ATTRIBUTES[name][value])
        other = ABSENT[name][rng.integers(len(ABSENT[name]))]
        text, count = re.subn(rf"\b(?:an? )?({wordings})\b", lambda match, other=other: replaced(match, other), text)
        assert count == 1, text
        rows.append(row)
        changed.append(text)
    return np.array(rows), changed


def replaced(match, other):
    """Another word in place of the one that matched, with the article that it needs."""
    article = match[0].partition(" ")[0] if match[0].startswith(("a ", "an ")) else ""
    if not article:
        return other
    return f"{'an' if other[0] in 'aeiou' else 'a'} {other}"


def sets():
    """What is asked: a list of Outside."""
    test, backbone = split("test"), make_backbone(load_config("shapes").encoder)
    fed = {side: torch.from_numpy(np.array(test.pairs.fed(side, True)[:])).float() for side in SIDES}
    unseen = Pairs("shapes-objects", "shapes-tiny", "shifted-test", pooled=True)
    shifted = torch.from_numpy(np.array(unseen.fed("image", True)[:])).float()
    is_hidden, both = hidden(test.scenes), (test.mentions[:, :2] != UNNAMED).all(axis=1)
    of_hidden = hidden(test.mentions)
    pixels = torch.stack([torch.as_tensor(np.asarray(backbone.transform(image))) for image in noise(NOISE)])
    rows, texts = renamed(test.pairs.items["text"], test.mentions)

    def encoded(side, pooled):  # as a cache holds it, in float16
        return join(pooled.embedding, pooled.pooled, f"{side}_bias" in test.pairs.projection).half().float()

    noisy = encoded("image", backbone.pooled_images(pixels))
    absent = encoded("text", backbone.pooled_texts(texts))
    seen = np.flatnonzero(~hidden(test.mentions[rows]))[:CAPTIONS]
    usual = fed["image"][~is_hidden]
    return [
        Outside("image", "images: unseen backgrounds", usual, shifted),
        Outside("image", "images: unseen pairs of shape and color", usual, fed["image"][is_hidden]),
        Outside("image", "images: noise", usual, noisy),
        Outside("text", "captions: unseen pairs", fed["text"][both & ~of_hidden], fed["text"][of_hidden]),
        Outside("text", "captions: absent things", fed["text"][rows][seen], absent[seen]),
    ]


def candidates(side):
    """What the softmax of MCM and energy runs over, (C, D): prompts of shape and color, or 1,000 training images."""
    if side == "image":
        prompts = [f"a photo of a {color} {shape}" for shape in VALUES[0] for color in VALUES[1]]
        return make_backbone(load_config("shapes").encoder).encode_texts(prompts)
    return queries("image", split("train").pairs)[:1000]


def scores(seed, rows, quiet):
    """Functions from a modality and fed queries (N, D + P) to what should be higher outside: {name: function}."""
    pairs = split("train").pairs
    dim, scale, of_side = pairs.dim, pairs.meta["logit_scale"], {side: candidates(side) for side in SIDES}

    def logits(side, x):
        return scale * F.normalize(x[:, :dim], dim=-1) @ F.normalize(of_side[side], dim=-1).T

    result = {
        "length": lambda side, x: -x[:, :dim].norm(dim=-1).numpy(),
        "MCM": lambda side, x: -logits(side, x).softmax(dim=-1).amax(dim=-1).numpy(),
        "energy": lambda side, x: -logits(side, x).logsumexp(dim=-1).numpy(),
    }
    bayesvlm, _ = fitted("bayesvlm", rows, seed, quiet)
    result["bayesvlm"] = lambda side, x: adapt_all(
        getattr(bayesvlm, f"adapt_{side}"), x.numpy(), "cpu"
    ).uncertainty.numpy()
    for method in METHODS:
        adaptor, _ = fitted(method, rows, seed, quiet)
        result[method] = lambda side, x, adaptor=adaptor: -density_of(adaptor, side, x[:, :dim])
    return result


def of_outside(seeds, quiet, figure):
    """Markdown: AUROC and FPR95 of every score on every set; the flow less the others."""
    part = split("train")
    scenes = part.scenes[part.pairs.image_of_text]
    rows, asked = np.flatnonzero(~hidden(scenes)), sets()
    values = {}  # by set and score: (seeds, N + M)
    for seed in seeds:
        for name, score in scores(seed, rows, quiet).items():
            asked_once = {}  # several sets have the same queries inside
            for one in asked:
                for x in (one.inside, one.outside):
                    if id(x) not in asked_once:
                        asked_once[id(x)] = score(one.side, x)
                both = np.concatenate([asked_once[id(one.inside)], asked_once[id(one.outside)]])
                values.setdefault((one.title, name), []).append(both)
    names, tables, summary = list(dict.fromkeys(name for _, name in values)), [], {}
    for one in asked:
        inside = np.repeat([1.0, 0.0], [len(one.inside), len(one.outside)])
        rng = np.random.default_rng(0)
        times = np.stack(
            [np.bincount(rng.integers(len(inside), size=len(inside)), minlength=len(inside)) for _ in range(DRAWS)]
        )
        drawn = {n: np.mean([auroc_of_draws(v, inside, times) for v in values[one.title, n]], axis=0) for n in names}
        title = f"{one.title} ({len(one.inside):,} inside, {len(one.outside):,} outside)"
        heads = " | ".join(f"{flow} less it, AUROC" for flow in FLOWS)
        lines = [f"| {title} | AUROC | FPR95 | {heads} |", "|:--|--:|--:|" + "--:|" * len(FLOWS)]
        point = {n: np.mean([auroc(v, inside) for v in values[one.title, n]]) for n in names}
        for name in names:
            of_seeds = values[one.title, name]
            rate = np.mean([false_positive_rates(v, inside)[0] for v in of_seeds])
            gaps = " | ".join(
                "" if name == flow else f"{point[flow] - point[name]:+.3f} {interval(drawn[flow] - drawn[name])}"
                for flow in FLOWS
            )
            cell = f"{point[name]:.3f} {interval(drawn[name])}"
            cell += f", s.d. over seeds {np.std([auroc(v, inside) for v in of_seeds]):.3f}"
            lines.append(f"| {name} | {cell} | {rate:.3f} | {gaps} |")
            summary[one.title, name] = point[name], *np.quantile(drawn[name], [0.025, 0.975])
        tables.append("\n".join(lines))
    if figure:
        plot(asked, names, summary, {one.title: values[one.title, "flow"][0] for one in asked}, figure)
    return "\n\n".join(tables)


def plot(asked, names, summary, flow, path):
    """Draw, for each set, the AUROC of every score, and below it the flow's log density inside and outside."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots(2, len(asked), height_ratios=(3, 2), sharey="row")
    for (top, bottom), one in zip(axes.T, asked, strict=True):
        for row, name in enumerate(names):
            value, low, high = summary[one.title, name]
            color = "C1" if name in FLOWS else "C0"
            top.plot([low, high], [row, row], color=color, lw=2)
            top.plot(value, row, "o", color=color, ms=4)
        top.set_yticks(range(len(names)), names)
        top.axvline(0.5, color="gray", lw=0.5)
        top.set(xlim=(0, 1.02), xlabel="AUROC")
        top.set_title(one.title.replace(": ", ":\n").replace(" of shape and color", ""), fontsize=9)
        values = -flow[one.title]
        count, bins = len(one.inside), np.linspace(*np.quantile(values, [0.005, 1]), 40)
        for part, label, color in ((values[:count], "inside", "C0"), (values[count:], "outside", "C3")):
            bottom.hist(
                part, bins, weights=np.full(len(part), 1 / len(part)), histtype="step", label=label, color=color
            )
        bottom.set(xlabel="flow: nats above uniform")
    axes[1, 0].legend(fontsize=8)
    axes[1, 0].set_ylabel("share")
    figure.savefig(path, dpi=90)


# What it costs.


def of_cost(quiet):
    """Markdown: CPU seconds to learn from shapes' train split and to score it; the flow's at COCO's size."""
    part = split("train").pairs
    rows, text = np.arange(len(part.text)), queries("text", part)
    lines = ["| method | learn from 40,000 captions, D = 64 | score 40,000 captions |", "|:--|--:|--:|"]
    for method in METHODS:
        adaptor, seconds = fitted(method, rows, 0, quiet)
        started = time.process_time()
        density_of(adaptor, "text", text[:4000])
        lines.append(f"| {method} | {seconds:.0f} s | {10 * (time.process_time() - started):.0f} s |")
    lines += ["", "At D = 512, width 512:", "", "| method | a step of 2,048 pairs | so an epoch of COCO train2017 |"]
    lines[-1] += " an item | so val2017's images and captions |"
    lines.append("|:--|--:|--:|--:|--:|")
    x = F.normalize(torch.randn(2048, 512), dim=-1)
    for name, flow in zip(FLOWS, (Flow(512), JointFlow(512)), strict=True):
        optimizer = torch.optim.AdamW(flow.parameters())
        started = time.process_time()
        for _ in range(3):
            optimizer.zero_grad()
            flow.loss(x, x).backward()
            optimizer.step()
        step = (time.process_time() - started) / 3
        started = time.process_time()
        density_of(flow.eval(), "text", x[:512])
        item = (time.process_time() - started) / 512
        cells = f"{step:.2f} s", f"{591_753 / 2048 * step:.0f} s", f"{1000 * item:.1f} ms", f"{30_014 * item:.0f} s"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@exits_cleanly()
def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"by default all: {', '.join(PARTS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of `answers` and `outside`")
    parser.add_argument("--figure", type=Path, help="where to draw the figure of `outside`")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    parts = {
        "known": lambda: of_known(args.quiet),
        "pairs": lambda: of_pairs(args.quiet),
        "answers": lambda: of_answers(args.seeds, args.quiet),
        "scenes": lambda: of_scenes(args.quiet),
        "outside": lambda: of_outside(args.seeds, args.quiet, args.figure),
        "cost": lambda: of_cost(args.quiet),
    }
    ready(args.quiet)
    for name in args.parts or PARTS:
        print(f"\n### {name}\n\n{parts[name]()}", flush=True)


if __name__ == "__main__":
    main()
