"""PFE, PCME++ and ProLIP: parity of their `reference` presets, their losses, their shared algebra and its memory."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh import printed
from golden import problem, recorded, reference
from scipy import integrate, stats

from models.base import Embedding
from models.gaussian import kl_to_standard_normal
from models.pcmepp import PCMEPP
from models.pfe import PFE
from models.prolip import ProLIP, log_inclusion
from utils.config import load_config, make_adaptor

GOLDEN = recorded("gaussian")
CLASSES = [PFE, PCMEPP, ProLIP]


@pytest.mark.parametrize("method", ["pfe", "pcmepp", "prolip"])
def test_reference_preset_equals_the_public_suite(method):
    golden = dict(GOLDEN[method])
    adaptor = reference(method)
    image, text = problem()
    adapted_image, adapted_text = adaptor.adapt_image(image), adaptor.adapt_text(text)
    loss = adaptor.loss(image, text)
    loss.backward()
    parameters = sorted(adaptor.parameters(), key=lambda p: p.numel() == 1)  # the public code has its scalars last
    outputs = {
        "loss": loss.item(),
        "text_uncertainty": adapted_text.uncertainty.tolist(),
        "image_uncertainty": adapted_image.uncertainty.tolist(),
        "text_mean_first8": adapted_text.mean[:, :8].tolist(),
        "score": getattr(adaptor, load_config("coco", method, preset="reference").score)(adapted_image, adapted_text),
        "grad_norms": [p.grad.norm().item() for p in parameters],
    }
    outputs["score"] = outputs["score"].tolist()
    if "kl_terms" in golden:
        golden["kl_terms"] = [golden["kl_terms"]["image"], golden["kl_terms"]["text"]]
        outputs["kl_terms"] = [adaptor.kl(adapted_image).item(), adaptor.kl(adapted_text).item()]
    assert outputs.keys() == golden.keys()
    for name, value in outputs.items():
        np.testing.assert_allclose(value, golden[name], rtol=1e-10, err_msg=name)


def small(cls, dim=4, **options):
    """An adaptor in float64 whose variances and means differ between items, and 5 pairs, two of them of one image."""
    torch.manual_seed(0)
    adaptor = cls(dim=dim, width=8, hidden=1, **options).double()
    with torch.no_grad():
        for name, parameter in adaptor.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape))
            elif name.endswith("scale") or name == "shift":
                parameter.mul_(0.7)
    image, text = torch.randn(2, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    image[3] = image[1]
    return adaptor, image, text


def same_value_and_gradients(adaptor, loss, literal):
    torch.testing.assert_close(loss, literal, rtol=1e-10, atol=1e-12)
    parameters = list(adaptor.parameters())
    ours, theirs = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, literal))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("options", [{"mean": "residual"}, {"mean": "raw", "variance": "softplus", "floor": 0.0}])
def test_pfe_is_the_literal_one(isotropic, options):
    """Score and loss are the mutual likelihood, summed coordinate by coordinate; InfoNCE trains corrected means."""
    adaptor, image, text = small(PFE, isotropic=isotropic, **options)
    raw = options["mean"] == "raw"

    def variance(head, x):
        output = head(x if raw else x / x.norm())
        sigma2 = torch.log(1 + torch.exp(output)) if raw else 1e-6 + torch.exp(output)
        return sigma2.mean().expand(4) if isotropic else sigma2

    def mean(module, x):
        return x if raw else module(x[None] / x.norm())[0]

    score, cosine = (torch.zeros(5, 5, dtype=torch.float64) for _ in range(2))
    for i in range(5):
        for j in range(5):
            mu_i, mu_t = mean(adaptor.image_mean, image[i]), mean(adaptor.text_mean, text[j])
            cosine[i, j] = mu_i @ mu_t / 0.07
            mu_i, mu_t = mu_i.detach(), mu_t.detach()
            s_i, s_t = variance(adaptor.image_log_variance, image[i]), variance(adaptor.text_log_variance, text[j])
            for d in range(4):
                total = s_i[d] + s_t[d]
                score[i, j] = score[i, j] - (mu_i[d] - mu_t[d]) ** 2 / total / 2 - torch.log(total) / 2
    matrix = adaptor.log_likelihood(adaptor.adapt_image(image), adaptor.adapt_text(text))
    torch.testing.assert_close(matrix, score, rtol=1e-10, atol=1e-12)
    literal = -2 * sum(score[i, i] for i in range(5)) / 5
    if not raw:
        for i in range(5):
            of_row, of_column = torch.logsumexp(cosine[i], 0), torch.logsumexp(cosine[:, i], 0)
            literal = literal + (of_row + of_column - 2 * cosine[i, i]) / 10
    same_value_and_gradients(adaptor, adaptor.loss(image, text), literal)


def literal_gaussians(adaptor, image, text, floor):
    sides = []
    for mean, head, rows in (
        (adaptor.image_mean, adaptor.image_log_variance, image),
        (adaptor.text_mean, adaptor.text_log_variance, text),
    ):
        unit = [x / x.norm() for x in rows]
        sides.append([(mean(x[None])[0], torch.log(floor + torch.exp(head(x)))) for x in unit])
    return sides


def literal_kl(gaussians, halved=False):
    terms = []
    for mu, s in gaussians:
        s = s / 2 if halved else s
        terms += [(torch.exp(s[d]) + mu[d] ** 2 - 1 - s[d]) / 2 for d in range(len(mu))]
    return sum(terms) / len(terms)


def literal_cross_entropy(logit, positive):
    return sum(
        -torch.log(torch.sigmoid(logit[i, j] if positive(i, j) else -logit[i, j])) for i in range(5) for j in range(5)
    )


@pytest.mark.parametrize("same_image", [False, True])
@pytest.mark.parametrize("options", [{"mean": "residual"}, {"mean": "learned", "scale": "free", "vib": 0.3}])
def test_pcmepp_is_the_literal_one(same_image, options):
    """Cross-entropies of expected distances of samples, coordinate by coordinate."""
    adaptor, image, text = small(PCMEPP, same_image=same_image, pseudo=0.1, **options)
    images, texts = literal_gaussians(adaptor, image, text, 1e-6)
    logit = torch.empty(5, 5, dtype=torch.float64)
    for i, (mu_i, s_i) in enumerate(images):
        for j, (mu_t, s_t) in enumerate(texts):
            distance = sum((mu_i[d] - mu_t[d]) ** 2 + torch.exp(s_i[d]) + torch.exp(s_t[d]) for d in range(4))
            logit[i, j] = -adaptor.scale * distance + adaptor.shift

    def truth(i, j):
        return i == j or (same_image and {i, j} == {1, 3})

    in_row = literal_cross_entropy(logit, lambda i, j: truth(i, j) or logit[i, j] >= logit[i, i])
    in_column = literal_cross_entropy(logit, lambda i, j: truth(i, j) or logit[i, j] >= logit[j, j])
    literal = (2 * literal_cross_entropy(logit, truth) + 0.1 * (in_row + in_column)) / 25
    literal = literal + options.get("vib", 1e-4) * (literal_kl(images) + literal_kl(texts))
    assert in_row > in_column + 1e-3 or in_column > in_row + 1e-3  # the problem has pseudo-positives
    same_value_and_gradients(adaptor, adaptor.loss(image, text), literal)


@pytest.mark.parametrize("same_image", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_prolip_is_the_literal_one(same_image, published):
    """Sigmoid loss, image-in-text inclusion by the paper's a, b and c, and KL, also in the published variants."""
    kinds = {"kl": "halved", "inclusion_weights": "published", "scale": "fixed"} if published else {}
    adaptor, image, text = small(ProLIP, mean="residual", same_image=same_image, inclusion=0.5, vib=0.3, **kinds)
    images, texts = literal_gaussians(adaptor, image, text, 1e-6)
    scale, shift = (1, 0) if published else (adaptor.log_scale.exp(), adaptor.shift)
    logit = torch.empty(5, 5, dtype=torch.float64)
    for i, (mu_i, s_i) in enumerate(images):
        for j, (mu_t, s_t) in enumerate(texts):
            penalty = sum(torch.exp(s_i[d]) + torch.exp(s_t[d]) for d in range(4)) / 2
            logit[i, j] = scale * (sum(mu_i[d] * mu_t[d] for d in range(4)) - penalty) + shift

    def inclusion(mu1, s1, mu2, s2):
        a = torch.exp(-s1) + torch.exp(-s2) / 2
        b = 2 * mu1 * torch.exp(-s1) + mu2 * torch.exp(-s2)
        c = mu1**2 * torch.exp(-s1) + mu2**2 * torch.exp(-s2) / 2
        return (-2 * s1 - s2 if published else -s1 - s2 / 2) - torch.log(a) / 2 + b**2 / (4 * a) - c

    inside = 0
    for (mu_i, s_i), (mu_t, s_t) in zip(images, texts):
        for d in range(4):
            in_text = inclusion(mu_i[d], s_i[d], mu_t[d], s_t[d])
            in_image = inclusion(mu_t[d], s_t[d], mu_i[d], s_i[d])
            inside = inside + F.softplus(-1000 * (in_text - in_image)) / 20
    literal = literal_cross_entropy(logit, lambda i, j: i == j or (same_image and {i, j} == {1, 3})) / 5
    literal = literal + 0.5 * inside + 0.3 * (literal_kl(images, published) + literal_kl(texts, published))
    same_value_and_gradients(adaptor, adaptor.loss(image, text), literal)


# The inclusion loss is too steep, a thousand times a difference, for finite differences.
@pytest.mark.parametrize(
    ("cls", "options"), [(PFE, {"isotropic": False}), (PFE, {}), (PCMEPP, {}), (ProLIP, {"inclusion": 0.0})]
)
def test_gradients_are_the_numerical_ones(cls, options):
    adaptor, image, text = small(cls, dim=3, mean="residual", **options)
    parameters = {name: p.detach() for name, p in adaptor.named_parameters() if p.numel() < 30}
    # PFE's own loss detaches a corrected mean, which finite differences do not.
    for objective in ("unified_loss",) if cls is PFE else ("loss", "unified_loss"):

        def value(*values, objective=objective):
            adaptor.forward = getattr(adaptor, objective)
            return torch.func.functional_call(adaptor, dict(zip(parameters, values)), (image, text))

        torch.autograd.gradcheck(value, [p.clone().requires_grad_() for p in parameters.values()])


def random_embedding(count, dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=-1)
    log_variance = torch.randn(count, dim, generator=generator, dtype=torch.float64) - math.log(dim)
    mean, log_variance = mean.to(dtype), log_variance.to(dtype)
    return Embedding(mean, log_variance.exp().mean(dim=-1), log_variance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_separable_scores_equal_the_pairwise_ones(dtype, tolerance):
    """Against tensors of size B x B x D at B = 64, D = 512, also the tiled mutual likelihood."""
    image, text = (random_embedding(64, 512, dtype, seed) for seed in (0, 1))
    variance = image.spread.exp()[:, None] + text.spread.exp()
    squares = (image.mean[:, None] - text.mean).square()
    naive = (squares + variance).sum(dim=-1)
    adaptor = PCMEPP(512, width=8, hidden=1).to(dtype)
    logit = adaptor.log_likelihood(image, text)
    torch.testing.assert_close(logit, adaptor.shift - adaptor.scale * naive, rtol=tolerance, atol=10 * tolerance)

    likelihood = PFE(512, width=8, hidden=1, isotropic=False).log_likelihood(image, text)
    naive = -(squares / variance + variance.log()).sum(dim=-1) / 2
    torch.testing.assert_close(likelihood, naive, rtol=tolerance, atol=0)


def test_pcmepp_and_prolip_are_one_function():
    """a_prolip = 2 a_pcmepp and b_prolip = b_pcmepp - 2 a_pcmepp, on unit means."""
    pcmepp, prolip = PCMEPP(16, width=8, hidden=1).double(), ProLIP(16, width=8, hidden=1).double()
    with torch.no_grad():
        prolip.log_scale.copy_(pcmepp.log_scale + math.log(2))
        prolip.shift.copy_(pcmepp.shift - 2 * pcmepp.scale)
    image, text = (random_embedding(7, 16, torch.float64, seed) for seed in (0, 1))
    torch.testing.assert_close(pcmepp.log_likelihood(image, text), prolip.log_likelihood(image, text))


@pytest.mark.parametrize(("mean", "log_variance"), [(0.04, -8.0), (0.7, 0.5), (-1.5, -2.0)])
def test_kl_equals_quadrature(mean, log_variance):
    p = stats.norm(mean, math.exp(log_variance / 2))
    ends = mean - 12 * p.std(), mean + 12 * p.std()
    expected, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - stats.norm.logpdf(x)), *ends, epsabs=1e-12)
    row = torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[log_variance]], dtype=torch.float64)
    np.testing.assert_allclose(kl_to_standard_normal(*row), expected, rtol=1e-8)


@pytest.mark.parametrize("first", [(0.1, -1.0), (-0.5, 1.0)])
@pytest.mark.parametrize("second", [(0.1, 0.0), (0.6, -2.0)])
def test_inclusion_equals_quadrature(first, second):
    p, q = (stats.norm(mean, math.exp(s / 2)) for mean, s in (first, second))
    expected, _ = integrate.quad(lambda x: p.pdf(x) ** 2 * q.pdf(x), -8, 8, epsabs=1e-13, limit=200)
    (mean1, s1), (mean2, s2) = torch.tensor([first, second], dtype=torch.float64)
    inner, outer = Embedding(mean1, None, s1), Embedding(mean2, None, s2)
    np.testing.assert_allclose(log_inclusion(inner, outer), math.log(expected), rtol=1e-8)


def test_published_kl_and_inclusion_have_the_known_errors():
    """At mu = 0.04, log sigma^2 = -8 the halved KL is 1.510, not 3.501; at equal means, log sigma^2 = 0 against 1, the
    inclusion logit is 0.8447, not 0.3447 (methods as published; figures by independent computation)."""
    item = Embedding(torch.full((1, 8), 0.04), None, torch.full((1, 8), -8.0))
    values = [ProLIP(8, width=4, hidden=1, kl=kl).kl(item).item() for kl in ("exact", "halved")]
    np.testing.assert_allclose(values, [3.501, 1.510], atol=1e-3)
    narrow, wide = (Embedding(torch.zeros(1, 1), None, torch.full((1, 1), s)) for s in (0.0, 1.0))
    for published, expected in ((False, 0.3447), (True, 0.8447)):
        logit = log_inclusion(narrow, wide, published) - log_inclusion(wide, narrow, published)
        np.testing.assert_allclose(logit.item(), expected, atol=1e-3)
    # The published eps of -20 takes the means out, wherever they are.
    official = make_adaptor(load_config("coco", "prolip", preset="official", settings=["model.width=4"]), 8)
    moved = wide._replace(mean=torch.full((1, 1), 4.0))
    arguments = official.published, official.closeness
    logit = log_inclusion(narrow, moved, *arguments) - log_inclusion(moved, narrow, *arguments)
    np.testing.assert_allclose(logit.item(), 0.8447, atol=1e-3)
    assert log_inclusion(narrow, moved, True) - log_inclusion(moved, narrow, True) > 0.8447 + 0.5


@pytest.mark.parametrize("objective", ["loss", "unified_loss"])
@pytest.mark.parametrize(
    ("method", "preset"),
    [("pfe", "default"), ("pfe", "official"), ("pcmepp", "default"), ("pcmepp", "official"), ("prolip", "default")]
    + [("prolip", "official")],
)
def test_unit_and_zero_embeddings_train(method, preset, objective):
    """With embeddings of length 1, and one of length 0 as a cache may contain, everything stays finite."""
    torch.manual_seed(0)
    adaptor = make_adaptor(load_config("shapes", method, preset=preset), 16)
    image, text = F.normalize(torch.randn(2, 12, 16), dim=-1)
    image[3], text[5] = 0, 0
    optimizer = torch.optim.AdamW(adaptor.parameters(), lr=1e-3)
    trace = []
    for _ in range(20):
        loss = getattr(adaptor, objective)(image, text)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in adaptor.parameters() if p.grad is not None)
        optimizer.step()
        trace.append(loss.item())
    assert all(map(math.isfinite, trace)) and trace[-1] < trace[0]
    for adapted in (adaptor.adapt_image(image), adaptor.adapt_text(text)):
        assert all(torch.isfinite(field).all() for field in adapted if field is not None)


def test_variance_starts_small_enough_for_means_to_matter():
    for cls, start in ((PFE, 1.0), (PCMEPP, 0.1), (ProLIP, 0.1)):
        torch.manual_seed(0)
        total = 512 * cls(512, width=64).adapt_text(torch.randn(20, 512)).uncertainty
        assert (total > start / 1.5).all() and (total < start * 1.5).all()


def test_same_image_captions_are_positives():
    image = torch.randn(3, 8)[[0, 1, 0, 2, 1]]
    group = PCMEPP(8, width=4, hidden=1).groups(image)
    positive = group[:, None] == group
    expected = [[i % 5 == j % 5 or {i, j} in ({0, 2}, {1, 4}) for j in range(5)] for i in range(5)]
    assert positive.tolist() == expected
    assert PCMEPP(8, width=4, hidden=1, same_image=False).groups(image).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cls", CLASSES)
def test_frozen_means_take_no_gradient(cls):
    adaptor = cls(dim=8, mean="frozen", width=4, hidden=1)
    assert not adaptor.adapt_image(torch.randn(3, 8)).mean.requires_grad


MEMORY = """
import resource
import sys
import torch
from utils.config import load_config, make_adaptor

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
method, objective, batch, *settings = sys.argv[1:]
adaptor = make_adaptor(load_config("shapes", method, settings=settings), 512)
image, text = torch.randn(2, int(batch), 512)
getattr(adaptor, objective)(image[:4], text[:4]).backward()
before = peak()
getattr(adaptor, objective)(image, text).backward()
print(peak() - before)
"""


# One B x B x D would be 411 MB for PFE, 8,590 MB for the others.
@pytest.mark.parametrize(
    ("most", "call"),
    [
        (150, ["pfe", "unified_loss", "448", "model.isotropic=false"]),
        (500, ["prolip", "loss", "2048", "model.mean=residual"]),
        (500, ["pcmepp", "loss", "2048", "model.mean=residual"]),
    ],
)
def test_no_tensor_is_pairs_by_dimensions(most, call):
    """Extra MB of forward and backward at D = 512, in a fresh process, because peak memory never falls."""
    assert float(printed(MEMORY, *call)) < most
