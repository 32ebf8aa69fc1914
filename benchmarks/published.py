"""Compare the published code with the right computation, in figures: `python -m benchmarks.published [ROW ...]`.

One line per row of configs/methods/README.md that names no other benchmark. Every figure is from our own code: a preset
or an option if the suite has one for the published arithmetic, else a literal formula here. All but `*_pairs` are
deterministic on one machine. Training is a few hundred small steps on a synthetic world, so figures show signs and
scales, not results on COCO.
"""

import argparse
import math
import subprocess
import sys
import time
from functools import lru_cache
from typing import NamedTuple

import mpmath
import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import resident
from labeling.acquisition import epig, online_update, select
from metrics.uncertainty import levels, spearman, trend
from models.asymvlm import AsymVLM, mean_of_bounds
from models.base import Embedding
from models.distributions import GeneralizedGaussian, PowerSpherical, VonMisesFisher
from models.laplace import PRIORS, Factors, Posterior, activation_factor, curvature
from models.pair_loss import info_nce
from models.prob_cosine import Gaussians, cosine_variance
from models.probvlm import exact_nll, geometric_variance, published_variance, surrogate_nll
from models.prolip import ProLIP, log_inclusion
from train import make_optimizer
from utils.config import load_config, make_adaptor

CLIP_DIM, SMALL_DIM = 512, 64
HELD_OUT = 500


class World(NamedTuple):
    """Matched images and captions (N, D), and how many features of its image a caption leaves open (N,)."""

    image: Tensor
    text: Tensor
    ambiguity: Tensor

    def train(self, rows):
        return self.image[:-HELD_OUT][rows], self.text[:-HELD_OUT][rows]


def draw_world(dim=SMALL_DIM, length=10.0, pairs=2500):
    """Draw images of eight features, each of one of four kinds, and captions that name 1, 2, 4 or 8 of the eight."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(8, 4, dim, generator=generator)
    parts = vectors[torch.arange(8), torch.randint(4, (pairs, 8), generator=generator)]
    named = 2 ** torch.randint(4, (pairs, 1), generator=generator)
    # A random order of 0 .. 7 is below m in m random places.
    kept = parts * (torch.rand(pairs, 8, generator=generator).argsort(dim=1) < named)[:, :, None]
    sides = []
    for features in (parts.sum(dim=1), kept.sum(dim=1) * (8 / named).sqrt()):
        # The noise is a quarter as long as the features, the modality gap equally long.
        gap = math.sqrt(8) * torch.randn(dim, generator=generator)
        noise = math.sqrt(0.5) * torch.randn(pairs, dim, generator=generator)
        sides.append(length * F.normalize(features + gap + noise, dim=-1))
    return World(*sides, 8 - named.squeeze(1))


def train(adaptor, config, world, steps=300, batch=256):
    """Train with the configuration's optimizer at a constant rate; yields the loss of every step."""
    optimizer = make_optimizer(adaptor, config.optim)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(world.image) - HELD_OUT, (batch,), generator=generator)
        loss = adaptor.loss(*world.train(rows))
        yield loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Trained(NamedTuple):
    """Adapted held-out pairs of a trained adaptor, and its figures."""

    loss: float  # of the last batch
    image: Embedding
    text: Embedding
    cosine: float  # text-to-image R@1 in % by the cosine of the means
    likelihood: float  # the same by the method's own score
    order: float  # Spearman correlation of the captions' uncertainty with their ambiguity


@lru_cache
def trained(method, preset, *settings, length=10.0, batch=256, change=lambda adaptor: None):
    """Train a small adaptor for 300 steps; rows with equal arguments share it."""
    world = draw_world(SMALL_DIM, length)
    # Among the data sets' optimizers, that of `shapes` is meant for hundreds of steps.
    config = load_config("shapes", method, preset=preset, settings=["model.width=64", "optim.lr=1e-3", *settings])
    torch.manual_seed(0)
    adaptor = make_adaptor(config, SMALL_DIM)
    change(adaptor)
    *_, loss = train(adaptor, config, world, batch=batch)
    with torch.no_grad():
        image, text = adaptor.adapt_image(world.image[-HELD_OUT:]), adaptor.adapt_text(world.text[-HELD_OUT:])
        recalls = [
            100 * (score.argmax(dim=0) == torch.arange(HELD_OUT)).float().mean().item()
            for score in (adaptor.similarity(image, text), adaptor.log_likelihood(image, text))
        ]
    order = spearman(text.uncertainty.numpy(), world.ambiguity[-HELD_OUT:].numpy())
    return Trained(loss, image, text, *recalls, order)


# AsymVLM


def asymvlm_normalizer():
    """Largest error of log C(kappa) - log C(0) for kappa from 1e-3 to 1e5, against 40 digits."""
    kappa = torch.logspace(-3, 5, 33, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    errors = {"published": [], "right": []}
    for dim in (CLIP_DIM, 3):
        with mpmath.workdps(40):
            exact = [-mpmath.log(mpmath.hyp0f1(mpmath.mpf(dim) / 2, mpmath.mpf(k) ** 2 / 4)) for k in kappa.tolist()]
        exact = torch.tensor([float(x) for x in exact], dtype=torch.float64)
        bounds = mean_of_bounds(kappa, dim) - mean_of_bounds(zero, dim)
        for name, value in (("published", bounds), ("right", VonMisesFisher.log_normalizer(kappa, dim))):
            errors[name].append(f"{(value - exact).abs().max():.4f} nat at D = {dim}")
    return tuple(map(", ".join, errors.values()))


def asymvlm_temperature():
    """Loss and R@1 after training from a temperature of -1, which only `free` allows, and with `exp` from 1."""

    def negate(adaptor):
        adaptor.free_temperature.data.neg_()

    free = trained("asymvlm-vmf", "reference", change=negate)
    positive = trained("asymvlm-vmf", "reference", "model.temperature=exp")
    return tuple(f"loss {fit.loss:.2f}, R@1 {fit.likelihood:.1f} %" for fit in (free, positive))


def decayed(method, scalar):
    """Value of a scalar after the published schedule on COCO at a gradient of 0, with and without weight decay."""
    results = []
    for decay_scalars in (True, False):
        config = load_config("coco", method, preset="reference", settings=[f"optim.decay_scalars={decay_scalars}"])
        config.model["width"] = 1
        adaptor = make_adaptor(config, 2)
        optimizer = make_optimizer(adaptor, config.optim)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is getattr(adaptor, scalar)]
        steps = math.ceil(591_753 / config.train.batch_size) * config.train.epochs
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=config.optim.min_lr)
        getattr(adaptor, scalar).grad = torch.zeros(())
        first = getattr(adaptor, scalar).item()
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        results.append(f"{first:g} -> {getattr(adaptor, scalar).item():.3f}")
    return tuple(results)


def asymvlm_decay():
    """The temperature after 57,800 steps of weight decay alone."""
    return decayed("asymvlm-vmf", "free_temperature")


def asymvlm_zero():
    """Loss, and number of rows of eta (64, 512) whose gradient is not finite if one row is zero."""
    generator = torch.Generator().manual_seed(0)
    image, eta = (F.normalize(torch.randn(64, CLIP_DIM, generator=generator), dim=-1) for _ in range(2))
    eta[0] = 0
    adaptor = AsymVLM(CLIP_DIM, family="von-mises-fisher", mean="learned", width=1)
    adaptor.text.eta = nn.Identity()

    def published(eta):
        kappa = eta.norm(dim=-1)
        return info_nce(kappa * (image @ (eta / kappa[:, None]).T) + VonMisesFisher.log_normalizer(kappa, CLIP_DIM))

    results = []
    for loss_of in (published, lambda eta: adaptor.loss(image, eta)):
        eta.requires_grad_().grad = None
        loss = loss_of(eta)
        loss.backward()
        results.append(f"loss {loss.item():.3f}, {(~eta.grad.isfinite()).any(dim=-1).sum()} of 64 rows")
    return tuple(results)


def asymvlm_opposite():
    """Share of opposite float32 unit vectors whose log(1 + cos) is not finite, and gradients that one such pair spoils.

    The pair is unmatched; the count is among the gradients of 4 kappas and the temperature.
    """
    x = F.normalize(torch.randn(4000, CLIP_DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    cos = torch.cat([(block @ -block.T).diagonal() for block in x.split(1000)])
    image = torch.eye(4)
    mu = F.normalize(image + 0.5, dim=-1)
    mu[1] = -image[0]
    results = []
    for kernel in (torch.log1p, PowerSpherical.log_kernel):
        kappa, temperature = torch.full((4,), 5.0, requires_grad=True), torch.ones(1, requires_grad=True)
        score = kappa * kernel(image @ mu.T) + PowerSpherical.log_normalizer(kappa, 4)
        info_nce(temperature * score).backward()
        broken = (~torch.cat((kappa.grad, temperature.grad)).isfinite()).sum()
        share = (~kernel(cos).isfinite()).float().mean()
        results.append(f"{100 * share:.0f} % of opposite vectors; {broken} of 5 gradients")
    return tuple(results)


def asymvlm_constant():
    """Captions whose best two of 5,000 images tie, and whose best image differs from float64, at kappa = 2."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(count, CLIP_DIM, generator=generator, dtype=torch.float64), dim=-1)
        for count in (5000, 8000)
    )
    best = torch.cat([(block @ image.T).argmax(dim=1) for block in text.split(1000)])
    kappa = torch.tensor(2.0)
    results = []
    for normalizer in (mean_of_bounds, VonMisesFisher.log_normalizer):
        ties = changed = 0
        for block, truth in zip(text.float().split(1000), best.split(1000), strict=True):
            score = kappa * (block @ image.float().T) + normalizer(kappa, CLIP_DIM)
            top = score.topk(2, dim=1).values
            ties += (top[:, 0] == top[:, 1]).sum().item()
            changed += (score.argmax(dim=1) != truth).sum().item()
        results.append(f"{100 * ties / 8000:.2f} % tie, {100 * changed / 8000:.2f} % change")
    return tuple(results)


# ProbVLM


def probvlm_sign():
    """Spearman correlation of the captions' uncertainty with their ambiguity, for one trained model."""
    fits = [trained("probvlm", "reference", f"model.reciprocal={kind}") for kind in ("true", "false")]
    return tuple(f"{fit.order:+.3f}" for fit in fits)


def fit_shape(nll, residual):
    """Minimize a likelihood over one 1 / alpha and one beta for all residuals (B, 1); returns both."""
    logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nll(residual, torch.zeros_like(residual), *logs.exp()).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logs.detach().exp()


def residuals(law):
    """20,000 quantiles (B, 1) of a distribution: a sample without noise."""
    return torch.tensor(law.ppf((np.arange(20_000) + 0.5) / 20_000))[:, None]


def probvlm_shape():
    """The best beta of a likelihood for Laplace, Gaussian and Student-t residuals (3 degrees of freedom)."""
    laws = scipy.stats.laplace, scipy.stats.norm, scipy.stats.t(3)
    return tuple(
        ", ".join(f"{fit_shape(nll, residuals(law))[1]:.3f}" for law in laws) for nll in (surrogate_nll, exact_nll)
    )


def probvlm_variance():
    """Variance reported for residuals of variance 1 by the surrogate, plain and clipped, and by the exact fit."""
    results = []
    for nll in (surrogate_nll, exact_nll):
        inverse_alpha, beta = fit_shape(nll, residuals(scipy.stats.norm))
        results.append(GeneralizedGaussian(torch.zeros(()), 1 / inverse_alpha, beta).variance.item())
        if nll is surrogate_nll:
            results.append(published_variance(inverse_alpha[None, None], beta[None, None]).item())
    return f"{results[0]:.2f}, clipped {results[1]:.2f}", f"{results[2]:.2f}"


def probvlm_blow_up():
    """Factor on an item's uncertainty if 1 of its 512 dimensions has the smallest beta that the head can output."""
    inverse_alpha, beta = torch.ones(1, CLIP_DIM), torch.ones(1, CLIP_DIM)
    results = []
    for variance, least in ((published_variance, 0.0), (geometric_variance, 0.5)):
        worst = beta.clone()
        worst[0, 0] = least
        results.append(f"{(variance(inverse_alpha, worst) / variance(inverse_alpha, beta)).item():.3g}")
    return tuple(results)


def probvlm_mean():
    """Text-to-image R@1 by the cosine of reconstructed means, of the embeddings, and of corrected means."""
    published, frozen = (trained("probvlm", preset).cosine for preset in ("reference", "default"))
    corrected = trained("probvlm", "default", "model.mean=residual").cosine
    return f"R@1 {published:.1f} %", f"R@1 {frozen:.1f} %, corrected {corrected:.1f} %"


def of_two_lengths(method, *settings):
    """Mean variance of the captions from embeddings of length 10 and of length 1, and Spearman between the two."""
    results = []
    for preset in ("reference", "default"):
        long, short = (trained(method, preset, *settings, length=x).text.uncertainty for x in (10.0, 1.0))
        agreement = spearman(long.numpy(), short.numpy())
        results.append(f"{long.mean():.2g}, {short.mean():.2g}, Spearman {agreement:.2f}")
    return tuple(results)


def probvlm_length():
    """ProbVLM on raw embeddings, and on embeddings of equal length."""
    return of_two_lengths("probvlm", "model.reciprocal=false")


# PFE


def pfe_floor():
    """Step at which training diverges if all pairs of unit embeddings agree in 1 of 512 coordinates."""
    world = draw_world(CLIP_DIM, length=1.0)
    world.image[:, 0] = world.text[:, 0] = 0
    results = []
    for preset in ("reference", "official"):
        config = load_config("coco", "pfe", preset=preset, settings=["model.width=64"])
        torch.manual_seed(0)
        adaptor = make_adaptor(config, CLIP_DIM)
        losses = enumerate(train(adaptor, config, world, steps=500, batch=64))
        broken = next((step for step, loss in losses if not math.isfinite(loss)), None)
        results.append("none in 500" if broken is None else f"step {broken}")
    return tuple(results)


def pfe_length():
    """PFE on raw embeddings, and on unit ones."""
    return of_two_lengths("pfe")


def pfe_score():
    """Text-to-image R@1 by the cosine, and by the mutual likelihood with one variance per item or per coordinate."""
    fit, diagonal = trained("pfe", "default"), trained("pfe", "official")
    return f"{fit.cosine:.1f} %", f"{fit.likelihood:.1f} %, diagonal {diagonal.likelihood:.1f} %"


def pfe_isotropic():
    """Order of captions by the mean of 512 variances, and by the one variance of an item."""
    return tuple(f"order {trained('pfe', preset).order:+.3f}" for preset in ("official", "default"))


# PCME++ and ProLIP


def pairwise(method, published):
    """Return a function that scores 512 x 512 pairs at D = 512, with gradients, as published or as in the suite."""
    adaptor = make_adaptor(load_config("coco", method, preset="reference", settings=["model.width=1"]), CLIP_DIM)
    mean, log_variance = torch.randn(2, 2, 512, CLIP_DIM, generator=torch.Generator().manual_seed(0)).unbind()
    image, text = (Embedding(*pair) for pair in zip(F.normalize(mean, dim=-1), [None] * 2, log_variance - 6))

    def call():
        spreads = [side.spread.clone().requires_grad_() for side in (image, text)]
        i, t = (Embedding(side.mean, s.exp().mean(dim=-1), s) for side, s in zip((image, text), spreads))
        if not published:
            score = adaptor.log_likelihood(i, t)
        else:
            both = (i.spread.exp()[:, None] + t.spread.exp()).sum(dim=-1)
            if method == "pcmepp":
                score = adaptor.shift - adaptor.scale * ((i.mean[:, None] - t.mean).square().sum(dim=-1) + both)
            else:
                score = adaptor.scale * (i.mean @ t.mean.T - both / 2) + adaptor.shift
        F.logsigmoid(score).sum().backward()

    return call


def time_and_memory(method):
    """Processor time of a call, and growth of peak memory over one call in a fresh process."""
    results = []
    for published in (True, False):
        call = pairwise(method, published)
        call()
        started = time.process_time()
        for _ in range(3):
            call()
        seconds = (time.process_time() - started) / 3
        command = [sys.executable, "-m", "benchmarks.published", "--memory", method, "--published", str(int(published))]
        memory = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        results.append(f"{seconds:.2g} s, {memory:.0f} MB")
    return tuple(results)


def pcmepp_pairs():
    """Scores of 512 x 512 pairs with gradients, by a tensor of 512 x 512 x 512, and by matrix products."""
    return time_and_memory("pcmepp")


def pcmepp_negatives():
    """Pairs of captions of one image that are negatives in a batch of 2,048 of COCO's 5 x 118,287 captions."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(118_287, 8, generator=generator)
    owners = [batch // 5 for batch in torch.randperm(5 * len(images), generator=generator).split(2048)[:120]]
    results = []
    for preset in ("reference", "default"):
        adaptor = make_adaptor(load_config("coco", "pcmepp", preset=preset, settings=["model.width=1"]), 8)
        apart = 0
        for owner in owners:
            group = adaptor.groups(images[owner])
            apart += ((owner[:, None] == owner) & (group[:, None] != group)).sum().item()
        results.append(f"{apart / 2 / len(owners):.1f}")
    return tuple(results)


def pcmepp_pseudo():
    """R@1 by the method's score, and order of the captions' uncertainty, with and without pseudo-positives."""
    fits = (trained("pcmepp", "default", f"model.pseudo={weight}") for weight in (0.1, 0.0))
    return tuple(f"R@1 {fit.likelihood:.1f} %, order {fit.order:+.2f}" for fit in fits)


def start(method):
    """S of images and of captions before and after 100 training steps, at the published width and learning rate."""
    world = draw_world(CLIP_DIM)
    results = []
    for preset in ("reference", "default"):
        config = load_config("coco", method, preset=preset)
        torch.manual_seed(0)
        adaptor = make_adaptor(config, CLIP_DIM)

        def totals(adaptor=adaptor):
            with torch.no_grad():
                sides = adaptor.adapt_image(world.image), adaptor.adapt_text(world.text)
            return " and ".join(f"{CLIP_DIM * side.uncertainty.mean():.3g}" for side in sides)

        before = totals()
        for _ in train(adaptor, config, world, steps=100, batch=64):
            pass
        results.append(f"{before} -> {totals()}")
    return tuple(results)


def pcmepp_start():
    """Sum S of the variances of PCME++ before training and after 100 steps."""
    return start("pcmepp")


def pcmepp_decay():
    """The logit's scale after 57,800 steps of weight decay alone."""
    return decayed("pcmepp", "free_scale")


def corrected_or_frozen(method):
    fits = (trained(method, "default", f"model.mean={mean}") for mean in ("residual", "frozen"))
    return tuple(f"R@1 {fit.likelihood:.1f} %, order {fit.order:+.2f}" for fit in fits)


def pcmepp_mean():
    """R@1 by the method's score, and order of the captions' uncertainty, with trained and with frozen means."""
    return corrected_or_frozen("pcmepp")


def prolip_pairs():
    """Scores of 512 x 512 pairs with gradients, by a tensor of 512 x 512 x 512, and by matrix products."""
    return time_and_memory("prolip")


def prolip_base_rate():
    """Half of a pair's S_i + S_t after training with batches of 64 and of 256; ln 63 = 4.14, ln 255 = 5.54."""
    results = []
    for preset in ("reference", "default"):
        fits = [trained("prolip", preset, batch=batch) for batch in (64, 256)]
        halves = [SMALL_DIM / 2 * (fit.image.uncertainty + fit.text.uncertainty).mean().item() for fit in fits]
        results.append(", ".join(f"{half:.3g}" for half in halves))
    return tuple(results)


def prolip_start():
    """Sum S of the variances of ProLIP before training and after 100 steps."""
    return start("prolip")


def prolip_mean():
    """R@1 by the method's score, and order of the captions' uncertainty, with trained and with frozen means."""
    return corrected_or_frozen("prolip")


def prolip_kl():
    """KL divergence of N(0.04, e^-8) to N(0, 1), and its slope in the log variance."""
    results = []
    for kind in ("halved", "exact"):
        spread = torch.full((1, 1), -8.0, requires_grad=True)
        value = ProLIP(1, width=1, kl=kind).kl(Embedding(torch.full((1, 1), 0.04), None, spread))
        value.backward()
        results.append(f"{value.item():.3f}, slope {spread.grad.item():.4f}")
    return tuple(results)


def prolip_inclusion():
    """Inclusion of N(0, 1) in N(0, e) minus the reverse, per coordinate, as a logit."""
    narrow, wide = (Embedding(torch.zeros(1), None, torch.full((1,), s)) for s in (0.0, 1.0))
    return tuple(
        f"{(log_inclusion(narrow, wide, published) - log_inclusion(wide, narrow, published)).item():.4f}"
        for published in (True, False)
    )


# BayesVLM


class Towers(NamedTuple):
    """Inputs phi (N, P) of the last maps W (D, P), embeddings (N, D), W and its factors, by modality."""

    phi: dict[str, Tensor]
    embedding: dict[str, Tensor]
    weight: dict[str, Tensor]
    factors: dict[str, Factors]

    def posterior(self, side, **options):
        return Posterior(self.factors[side], self.weight[side].square().sum().item(), **options)


@lru_cache
def draw_towers(inputs=96, scale=30.0):
    """Draw last maps, and inputs that they map to the synthetic embeddings; compute both towers' factors."""
    world, generator = draw_world(), torch.Generator().manual_seed(1)
    embedding = {"image": world.image.double(), "text": world.text.double()}
    phi, weight, factors = {}, {}, {}
    for side, z in embedding.items():
        basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)).Q
        row_space, null_space = basis.split([SMALL_DIM, inputs - SMALL_DIM], dim=1)  # of W
        noise = torch.randn(len(z), inputs - SMALL_DIM, generator=generator).double()
        weight[side] = row_space.T
        phi[side] = z @ row_space.T + noise @ null_space.T
    for side, other in (("image", "text"), ("text", "image")):
        b = curvature(embedding[side], embedding[other], scale) / math.sqrt(len(phi[side]))
        factors[side] = Factors(activation_factor(phi[side]), b, len(phi[side]))
    return Towers(phi, embedding, weight, factors)


def bayesvlm_evidence():
    """Prior precision of the image tower that maximizes each objective, and mean variance of an embedding."""
    towers, results = draw_towers(), []
    for objective in ("published", "correct"):
        posterior = towers.posterior("image", objective=objective)
        trace = posterior.spread(towers.phi["image"]).sum(dim=1) / towers.embedding["image"].square().sum(dim=1)
        results.append(f"{posterior.precision:.1f}, tr Cov(g) / |g|^2 {trace.mean():.4f}")
    return tuple(results)


def bayesvlm_damping():
    """Mean variance of an image's embedding under each prior, at a shared precision and at its best one."""
    towers, results = draw_towers(), []
    shared = towers.posterior("image").precision
    for prior in PRIORS:
        best = towers.posterior("image", prior=prior)
        traces = [
            posterior.spread(towers.phi["image"]).sum(dim=1).mean().item()
            for posterior in (towers.posterior("image", prior=prior, precision=shared), best)
        ]
        results.append(f"tr Cov(g) {traces[0]:.2f}, with its own precision {best.precision:.1f} {traces[1]:.2f}")
    return tuple(results)


def bayesvlm_kfac():
    """Relative Frobenius distance of B (x) A from the sum that it approximates, over 30 images and over one."""
    towers, results = draw_towers(), []
    for count in (30, 1):
        phi, z = towers.phi["image"][:count], towers.embedding["image"][:count]
        hessians = [curvature(one[None], towers.embedding["text"], 30.0) for one in z]
        exact = sum(torch.kron(h, x.outer(x)) for h, x in zip(hessians, phi, strict=True))
        product = torch.kron(sum(hessians), phi.T @ phi) / count
        results.append(f"{((product - exact).norm() / exact.norm()).item():.2f}")
    return tuple(results)


def bayesvlm_variance():
    """Variance of the cosine by formula over that of 20,000 draws, mean of 20 pairs: diagonal, and tangent."""
    towers, sides = draw_towers(), {}
    for side in ("image", "text"):
        posterior = towers.posterior(side)
        sides[side] = Gaussians(towers.embedding[side][:20], posterior.spread(towers.phi[side][:20]), posterior.basis)
    ratios = {"diagonal": [], "tangent": []}
    for cosine in (0.24, 0.8):
        images, texts, drawn = *sides.values(), []
        x, y = F.normalize(images.mean, dim=-1), F.normalize(texts.mean, dim=-1)
        y = F.normalize(y - (x * y).sum(dim=1, keepdim=True) * x, dim=-1)
        length = texts.mean.norm(dim=-1, keepdim=True)
        texts = texts._replace(mean=length * (cosine * x + math.sqrt(1 - cosine**2) * y))
        generator = torch.Generator().manual_seed(0)
        for row in range(20):
            g, h = (
                side.mean[row] + (side.spread[row].sqrt() * noise.double()) @ side.basis.T
                for side, noise in zip((images, texts), torch.randn(2, 20_000, SMALL_DIM, generator=generator))
            )
            drawn.append(F.cosine_similarity(g, h).var())
        for variance, entries in ratios.items():
            ratio = cosine_variance(images, texts, variance).diag() / torch.stack(drawn)
            entries.append(f"{ratio.mean():.2f} at a cosine of {cosine}")
    return tuple(", ".join(entries) for entries in ratios.values())


class TwoRegions:
    """200 items in 6 clusters, 150 targets in two of them, and a Gaussian posterior of the weights of 10 classes."""

    def __init__(self, seed=0, dim=128):
        self.generator = torch.Generator().manual_seed(seed)
        centers = 0.4 * self.normal(6, dim)
        cluster = torch.arange(200) % 6
        self.in_region = cluster < 2
        self.items = torch.cat([centers[cluster], centers[torch.arange(150) % 2]]) + self.normal(350, dim)
        self.mean = self.normal(10, dim) / math.sqrt(dim)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def joint(self, count):
        """Probabilities (K, 200, 10) of items and (K, 150, 10) of targets; each draw shares one W."""
        weights = self.mean + 0.2 * self.normal(count, *self.mean.shape)
        return (self.items @ weights.mT).softmax(-1).split([200, 150], dim=1)

    def independent(self, count):
        """The same with separate draws of W for the targets, as published."""
        return self.joint(count)[0], self.joint(count)[1]

    def share(self, score):
        """Share of the 20 items with the highest scores that are in the target's region; 0.33 by chance."""
        return self.in_region[select(score, 20)].float().mean().item()


def bayesvlm_epig():
    """Share of EPIG's first 20 items in the target's region, over five posteriors, and mean EPIG by number of draws."""
    shares, means = {True: [], False: []}, {True: [], False: []}
    for published in (True, False):
        for seed in range(5):
            regions = TwoRegions(seed)
            draws = regions.independent(100) if published else regions.joint(250)
            shares[published].append(regions.share(epig(*draws, corrected=not published)))
        regions = TwoRegions()
        for count in (250, 4000):
            draws = (regions.independent if published else regions.joint)(count)
            means[published].append(f"{epig(*draws, corrected=not published).mean():.4f}")
    return tuple(f"{np.mean(shares[kind]):.2f}, mean {' and '.join(means[kind])}" for kind in (True, False))


def bayesvlm_online():
    """Remaining share of an image's variance after 50 copies of it were labeled, each counted ten times."""
    towers, results = draw_towers(), []
    posterior, x = towers.posterior("image"), towers.phi["image"][0]
    for published in (True, False):
        factors = towers.factors["image"]
        for _ in range(50):
            factors = Factors(*online_update(*factors, x, torch.zeros_like(factors.b), 10, published))
        after = Posterior(factors, posterior.norm_sq, precision=posterior.precision)
        # B changes by the count only, so the factor of A is compared alone.
        projections = [p.spectrum.a_basis.T @ x for p in (posterior, after)]
        spectra = [2 * p.spectrum.a + math.sqrt(posterior.precision) for p in (posterior, after)]
        before, now = ((u.square() / values).sum() for u, values in zip(projections, spectra, strict=True))
        results.append(f"{(now / before).item():.3f}")
    return tuple(results)


# The evaluation


class Queries(NamedTuple):
    """Queries of one kind (Q,) against a gallery of the other."""

    hit: np.ndarray  # whether the answer is right
    answer: np.ndarray  # row of the gallery
    uncertainty: np.ndarray  # of the query


@lru_cache
def draw_queries():
    """Draw 1,003 images and five captions of each, as noisy views of a scene, and retrieve both ways by cosine.

    Noise levels vary by a factor of six; uncertainty is the logarithm of the level, uniform, plus equal uniform noise.
    """
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(1003, SMALL_DIM, generator=generator)
    owners = torch.arange(1003), torch.arange(5 * 1003) // 5
    sides, uncertainties = [], []
    for owner in owners:
        level, chance = torch.rand(2, len(owner), generator=generator)
        noise = torch.randn(len(owner), SMALL_DIM, generator=generator)
        sides.append(F.normalize(scene[owner] + 0.5 * 6 ** level[:, None] * noise, dim=-1))
        uncertainties.append((level + chance).numpy())
    cosine = sides[0] @ sides[1].T
    answers = cosine.argmax(dim=1), cosine.argmax(dim=0)
    hits = owners[1][answers[0]] == owners[0], answers[1] == owners[1]
    queries = zip(hits, answers, uncertainties, strict=True)
    return tuple(Queries(hit.numpy(), answer.numpy(), uncertainty) for hit, answer, uncertainty in queries)


def leveled(hit, uncertainty, drop_remainder=False):
    """Text with the R@1 of ten levels, their trend, and the number of queries in no level."""
    groups = levels(uncertainty, 10, drop_remainder)
    recalls = [100 * hit[rows].mean() for rows in groups]
    left = np.setdiff1d(np.arange(len(hit)), np.concatenate(groups))
    fit = trend(recalls)
    figures = f"S {fit.s:.3f}, R2 {fit.r2:.3f}, -S R2 {fit.minus_s_r2:.3f}"
    recall_left = f" (R@1 {100 * hit[left].mean():.0f} %)" if len(left) else ""
    return f"R@1 {' '.join(f'{recall:.0f}' for recall in recalls)} %, {figures}, {len(left)} left out{recall_left}"


def levels_remainder():
    """Levels of Q // 10 captions without the most uncertain ones, and levels of all."""
    _, captions = draw_queries()
    hit, uncertainty = captions.hit, captions.uncertainty
    return leveled(hit, uncertainty, drop_remainder=True), leveled(hit, uncertainty)


def levels_retrieved():
    """Levels of images by the uncertainty of the caption that each retrieves, and by that of the image."""
    images, captions = draw_queries()
    published = leveled(images.hit, captions.uncertainty[images.answer], drop_remainder=True)
    return published, leveled(images.hit, images.uncertainty)


ROWS = {
    row.__name__: row
    for row in (
        *(asymvlm_normalizer, asymvlm_temperature, asymvlm_decay, asymvlm_zero, asymvlm_opposite, asymvlm_constant),
        *(probvlm_sign, probvlm_shape, probvlm_variance, probvlm_blow_up, probvlm_mean, probvlm_length),
        *(pfe_floor, pfe_length, pfe_score, pfe_isotropic),
        *(pcmepp_pairs, pcmepp_negatives, pcmepp_pseudo, pcmepp_start, pcmepp_decay, pcmepp_mean),
        *(prolip_pairs, prolip_base_rate, prolip_start, prolip_mean, prolip_kl, prolip_inclusion),
        *(bayesvlm_evidence, bayesvlm_damping, bayesvlm_kfac, bayesvlm_variance, bayesvlm_epig, bayesvlm_online),
        *(levels_remainder, levels_retrieved),
    )
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="by default all")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--published", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        parser.error(f"there is no row '{unknown[0]}'; there is {', '.join(ROWS)}")
    if args.memory:
        call = pairwise(args.memory, bool(args.published))
        before = resident("VmRSS")
        call()
        print(resident("VmHWM") - before)
        return
    for name in args.rows or ROWS:
        published, right = ROWS[name]()
        print(f"{name:20} published {published}; right {right}", flush=True)


if __name__ == "__main__":
    main()
