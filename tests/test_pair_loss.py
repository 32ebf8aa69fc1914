"""The tiled losses of pairs against the same losses of a matrix of scores, which autograd differentiates."""

import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh import printed
from scipy.special import logsumexp

from models import pair_loss
from models.distributions import PowerSpherical, VonMisesFisher
from models.pair_loss import Linear, Logarithm, PairScore, cross_entropies, info_nce
from models.pfe import IsotropicLikelihood
from models.symmetric_vmf import ExpectedLikelihood

DIMS = (512, 768, 1024)
FORMS = {
    "clip": dict(kernel=Linear, slope=()),
    "von Mises-Fisher": dict(kernel=Linear, slope="vector", column=VonMisesFisher),
    "power spherical": dict(kernel=Logarithm, slope="vector", column=PowerSpherical),
    "gaussian": dict(kernel=Linear, slope=(), row="vector", column="vector"),
    "expected likelihood": dict(
        kernel=ExpectedLikelihood, slope=(), row="vector", column="vector", parameters=(5, 300)
    ),
    "isotropic likelihood": dict(kernel=IsotropicLikelihood, slope=(), parameters=(0.05, 0.4)),
}
every_form = pytest.mark.parametrize("form", FORMS)
TENSORS = [field.name for field in fields(PairScore) if field.name != "kernel"]


def drawn(form, count, dim, dtype=torch.float64, seed=0, spread=1.0):
    """Matched pairs whose scores neither saturate a softmax nor are all alike; every tensor needs a gradient."""
    form, generator = FORMS[form], torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image = F.normalize(random(count, dim), dim=-1)
    text = F.normalize(image + 2 * random(count, dim) / dim**0.5, dim=-1)
    values = {"image": image, "text": text}
    wide = spread * 20 * (0.5 + torch.rand(count, generator=generator, dtype=torch.float64))
    values["slope"] = wide if form["slope"] else torch.tensor(spread * 3.0, dtype=torch.float64)
    for name in ("row", "column"):
        kind = form.get(name)
        if kind:
            values[name] = random(count) if kind == "vector" else kind.log_normalizer(wide, dim)
    kernel = form["kernel"]
    if "parameters" in form:
        least, most = form["parameters"]
        kernel = kernel(dim)
        for name in ("row_parameter", "column_parameter"):
            values[name] = least + (most - least) * torch.rand(count, generator=generator, dtype=torch.float64)
    values = {k: v.to(dtype).requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    return PairScore(kernel=kernel, **values)


def gradients(score, loss):
    """The loss and its gradient in every tensor of the score."""
    loss = loss(score)
    tensors = [x for name in TENSORS if isinstance(x := getattr(score, name), torch.Tensor)]
    return [loss.detach(), *torch.autograd.grad(loss, tensors, allow_unused=True)]


GROUP = torch.arange(97) % 40  # three captions of the first 17 images, two of the others


def dense_sigmoid(score):
    return F.binary_cross_entropy_with_logits(score.dense(), (GROUP[:, None] == GROUP).to(score.image), reduction="sum")


LOSSES = {
    "info_nce": (PairScore.info_nce, lambda score: info_nce(score.dense())),
    "sigmoid": (lambda score: score.pairwise_sigmoid(GROUP.to(score.image.device)), dense_sigmoid),
}
every_loss = pytest.mark.parametrize("loss", LOSSES)


def relative(results, expected):
    """The largest difference relative to the largest entry of the same tensor; entries below 1e-20 count as zero."""
    return max(
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-20)).item() for a, b in zip(results, expected, strict=True)
    )


@pytest.fixture
def small_tiles(request, monkeypatch):
    """Tiles of 7 rows, so that 97 pairs end in a smaller one; how many numbers are kept for the backward pass."""
    monkeypatch.setattr(pair_loss, "CPU_TILE", 7 * 97)
    monkeypatch.setattr(pair_loss.Tiles, "least_rows", staticmethod(lambda dim: 1))
    monkeypatch.setattr(pair_loss, "KEPT", request.param)


# The sigmoid keeps nothing: its gradient comes with its value.
KEPT = {"all kept": ("info_nce", 2 * 97**2), "some kept": ("info_nce", 30 * 97), "none kept": ("info_nce", 10)}
KEPT["sigmoid"] = "sigmoid", 10
every_loss_and_memory = pytest.mark.parametrize(
    "loss, small_tiles", list(KEPT.values()), indirect=["small_tiles"], ids=list(KEPT)
)


@every_loss_and_memory
@every_form
def test_tiles_equal_the_matrix(form, loss, small_tiles):
    tiled, dense = LOSSES[loss]
    for dim in DIMS:
        score = drawn(form, 97, dim)
        assert relative(gradients(score, tiled), gradients(score, dense)) < 1e-12
        score = drawn(form, 97, dim, torch.float32)
        exact = drawn(form, 97, dim)
        exact = replace(
            exact, **{n: getattr(score, n).detach().double().requires_grad_() for n in TENSORS
                      if isinstance(getattr(score, n), torch.Tensor)}
        )  # fmt: skip
        expected = gradients(exact, dense)
        # Beyond 1e-5 only where scores of thousands are rounded, as they are in the matrix.
        rounding = relative(gradients(score, dense), expected)
        assert relative(gradients(score, tiled), expected) < max(1e-5, 1.1 * rounding)


@every_form
def test_info_nce_by_its_definition(form):
    """By NumPy in loops over queries, from the matrix of scores."""
    score = drawn(form, 23, 64)
    matrix = score.dense().detach().numpy()
    rows = [logsumexp(matrix[i]) - matrix[i, i] for i in range(23)]
    columns = [logsumexp(matrix[:, i]) - matrix[i, i] for i in range(23)]
    of_images, of_captions = (x.detach().numpy() for x in score.losses())
    np.testing.assert_allclose(of_images, rows, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(of_captions, columns, rtol=1e-12, atol=1e-13)
    assert score.info_nce().item() == pytest.approx(np.mean([rows, columns]), rel=1e-12)
    for dense, tiled in zip(cross_entropies(score.dense()), score.losses(), strict=True):
        torch.testing.assert_close(dense, tiled, rtol=1e-12, atol=1e-13)


@every_loss
@every_form
def test_gradients_by_differences(form, loss, monkeypatch):
    score = drawn(form, 6, 5)
    names = [name for name in TENSORS if isinstance(getattr(score, name), torch.Tensor)]
    monkeypatch.setattr(sys.modules[__name__], "GROUP", GROUP[:6] % 4)

    def value(*tensors):
        return LOSSES[loss][0](replace(score, **dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(value, tuple(getattr(score, name).detach().requires_grad_() for name in names))


@every_loss_and_memory
@pytest.mark.parametrize("form", ["clip", "von Mises-Fisher", "power spherical"])
def test_scores_of_a_wide_range(form, loss, small_tiles):
    """Scores that differ by thousands, as overfitted densities do: no overflow, no underflow to a wrong gradient."""
    score = drawn(form, 97, 512, spread=300)
    tiled, dense = LOSSES[loss]
    results = gradients(score, tiled)
    assert all(x.isfinite().all() for x in results)
    assert relative(results, gradients(score, dense)) < 1e-12


def test_a_saturated_loss_keeps_its_digits_in_float32():
    """Power spherical with almost perfect matches: p - 1 of a match is far below the rounding of p."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(64, 512, generator=generator), dim=-1)
    text = F.normalize(image + 0.9 * torch.randn(64, 512, generator=generator) / 512**0.5, dim=-1)
    results = {}
    for dtype in (torch.float32, torch.float64):
        kappa = torch.full((64,), 30.0, dtype=dtype, requires_grad=True)
        normalizer = PowerSpherical.log_normalizer(kappa, 512)
        score = PairScore(image.to(dtype), text.to(dtype), slope=kappa, column=normalizer, kernel=Logarithm)
        results[dtype] = torch.autograd.grad(score.info_nce(), kappa)[0].double()
    assert results[torch.float64].abs().max() < 1e-3
    assert relative([results[torch.float32]], [results[torch.float64]]) < 1e-4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_opposite_means_of_power_spherical(dtype, tolerance):
    """Where log(1 + dot) is cut off, at the least cosine, it is constant: its gradient is 0, not 1 / (1 + dot)."""
    image, text = torch.eye(8, dtype=dtype)[:4], torch.eye(8, dtype=dtype)[:4]
    text[1] = -image[0]
    slope = torch.tensor(-1.0, dtype=dtype, requires_grad=True)
    score = PairScore(image.requires_grad_(), text.requires_grad_(), slope=slope, kernel=Logarithm)
    expected = gradients(score, LOSSES["info_nce"][1])
    assert expected[1].abs().max() < 1
    assert relative(gradients(score, PairScore.info_nce), expected) < tolerance


def test_a_number_for_each_row_is_refused_by_both_forms():
    score = PairScore(*torch.eye(4)[None].expand(2, 4, 4), row=1.0)
    for form in (PairScore.dense, PairScore.losses):
        with pytest.raises(TypeError):
            form(score)


def test_gradients_of_both_directions_apart():
    """`losses` are per query, so that a method can weigh them."""
    score, generator = drawn("von Mises-Fisher", 31, 16), torch.Generator().manual_seed(1)
    weights = torch.randn(2, 31, generator=generator, dtype=torch.float64)

    def weighted(losses):
        return sum((w * loss).sum() for w, loss in zip(weights, losses, strict=True))

    tiled = gradients(score, lambda s: weighted(s.losses()))
    assert relative(tiled, gradients(score, lambda s: weighted(cross_entropies(s.dense())))) < 1e-12


MEMORY = """
import resource, sys, torch
from models.pair_loss import Logarithm, PairScore
from models.pfe import IsotropicLikelihood
torch.set_num_threads(1)
count, apart = int(sys.argv[1]), sys.argv[2] == "apart"
image, text = torch.nn.functional.normalize(torch.randn(2, count, 64), dim=-1)
def step(image, text):
    text = text.clone().requires_grad_()
    slope = torch.full((len(text),), 20.0, requires_grad=True)
    of_kernel = dict(row_parameter=slope / 100, column_parameter=slope / 100) if apart else {}
    kernel = IsotropicLikelihood(64) if apart else Logarithm
    PairScore(image, text, slope=slope, kernel=kernel, **of_kernel).info_nce().backward()
step(image[:64], text[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(image, text)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("values", ["in place", "apart"])
def test_no_matrix_beyond_the_pairs_that_are_kept(values):
    assert float(printed(MEMORY, "8192", values)) < 100  # MB; one matrix has 256
