"""The Laplace posterior of a last linear map: its Gauss-Newton factors, prior precision, covariance and files."""

import io
import math
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import homogeneous
from torch.autograd.functional import hessian, jacobian

from models.laplace import (
    Factors,
    Posterior,
    Spectrum,
    activation_factor,
    best_precision,
    curvature,
    decompose,
    load_published,
)
from utils.errors import UserError

SCALE, BIAS = 3.0, -0.7
NORM_SQ = {"image": 63.6576, "text": 42.1238}  # of laion's ViT-B/32
LOSSES = ("infonce", "siglip")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def relative(result, expected):
    """Relative Frobenius distance."""
    return ((result - expected).norm() / expected.norm()).item()


def logits(g, target):
    return SCALE * F.normalize(target, dim=-1) @ (g / g.norm()) + BIAS


def loss_curvature(logit, loss, seed=0):
    """Hessian (K, K) of the loss of one item's logits, by autograd, under labels drawn by the seed."""
    labels = torch.Generator().manual_seed(seed)
    if loss == "infonce":
        label = torch.randint(len(logit), (), generator=labels)
        return hessian(lambda z: F.cross_entropy(z, label), logit)
    sign = torch.randint(2, logit.shape, generator=labels) * 2 - 1
    return hessian(lambda z: -F.logsigmoid(sign * z).sum(), logit)


def embedding_ggn(source, target, loss, seed=0):
    """sum_i J_i^T Lambda_i J_i (D, D), by autograd."""
    total = 0
    for g in source:
        of_logits = jacobian(lambda x: logits(x, target), g)
        total = total + of_logits.T @ loss_curvature(logits(g, target), loss, seed) @ of_logits
    return total


def textbook(source, target, loss):
    """The same item by item, in closed form and in the type of its arguments."""
    target, total = F.normalize(target, dim=-1), 0
    for g in source:
        x = g / g.norm()
        of_cosines = target @ (torch.eye(len(g), dtype=g.dtype) - torch.outer(x, x)) / g.norm()
        z = SCALE * target @ x + BIAS
        c = z.softmax(0) if loss == "infonce" else z.sigmoid() * (1 - z.sigmoid())
        middle = c.diag() - torch.outer(c, c) if loss == "infonce" else c.diag()
        total = total + SCALE**2 * of_cosines.T @ middle @ of_cosines
    return total


@pytest.mark.parametrize("loss", LOSSES)
def test_curvature_is_the_autograd_ggn(loss):
    """It equals sum_i J_i^T Lambda_i J_i, in blocks that do not divide N; the labels of sigmoids do not matter."""
    source, target = 2 * randn(7, 6), randn(11, 6, seed=1)
    result = curvature(source, target, SCALE, BIAS, loss, block=3)
    expected = embedding_ggn(source, target, loss)
    assert relative(result, expected) < 1e-10
    assert relative(embedding_ggn(source, target, loss, seed=5), expected) < 1e-12
    assert relative(textbook(source, target, loss), expected) < 1e-10


@pytest.mark.parametrize("loss", LOSSES)
def test_curvature_in_float32(loss):
    """It is within 1e-4 of the closed form, also at the temperature of real models."""
    source, target = 5 * randn(40, 64, dtype=torch.float32), randn(500, 64, seed=1, dtype=torch.float32)
    result = curvature(source, target, SCALE, BIAS, loss)
    assert result.dtype == torch.float32
    assert relative(result, textbook(source, target, loss)) < 1e-4
    sharp, exact = (curvature(source.to(t), target.to(t), 100.0, 0.0, loss) for t in (torch.float32, torch.float64))
    assert relative(sharp.double(), exact) < 1e-4


@pytest.mark.parametrize("loss", LOSSES)
def test_curvature_of_one_item(loss):
    """H g = 0, because a cosine ignores length, and H has no negative eigenvalue."""
    for seed in range(5):
        g = randn(1, 8, seed=seed)
        h = curvature(g, randn(20, 8, seed=9), SCALE, BIAS, loss)
        assert (h @ g[0]).norm() < 1e-10 * h.norm()
        assert torch.linalg.eigvalsh(h).min() > -1e-10


def test_curvature_skips_embeddings_of_no_length():
    source, target = randn(5, 4), randn(6, 4, seed=1)
    with_zero = torch.cat([source[:2], torch.zeros(1, 4, dtype=torch.float64), source[2:]])
    torch.testing.assert_close(curvature(with_zero, target, SCALE), curvature(source, target, SCALE))
    with pytest.raises(ValueError, match="loss must be infonce or siglip"):
        curvature(source, target, SCALE, loss="clip")


def tiny(count, loss="infonce", size=(3, 4)):
    """phi (N, P), the Gauss-Newton matrix (DP, DP) of W (D, P) by autograd, each item's H, and the factors."""
    d, p = size
    phi, weight, target = randn(count, p), randn(d, p, seed=1), randn(5, d, seed=2)
    ggn = torch.zeros(d * p, d * p, dtype=torch.float64)
    for x in phi:
        of_logits = jacobian(lambda w, x=x: logits(w.view(d, p) @ x, target), weight.flatten())
        ggn += of_logits.T @ loss_curvature(logits(weight @ x, target), loss) @ of_logits
    source = phi @ weight.T
    each = [curvature(g[None], target, SCALE, BIAS, loss) for g in source]
    b = curvature(source, target, SCALE, BIAS, loss) / math.sqrt(count)
    return phi, ggn, each, Factors(activation_factor(phi), b, count)


@pytest.mark.parametrize("loss", LOSSES)
def test_weight_ggn_is_a_sum_of_kronecker_products(loss):
    """The matrix of W is sum_i H_i (x) phi_i phi_i^T; B (x) A is exact for one item, and nearer than 0 for 30."""
    phi, ggn, each, factors = tiny(30, loss)
    assert relative(sum(torch.kron(h, torch.outer(x, x)) for h, x in zip(each, phi)), ggn) < 1e-10
    product = torch.kron(factors.b, factors.a)
    assert relative(product, torch.kron(sum(each), phi.T @ phi) / 30) < 1e-10
    assert relative(product, ggn) < 1
    _, ggn, _, factors = tiny(1, loss)
    assert relative(torch.kron(factors.b, factors.a), ggn) < 1e-10


def test_activation_factor_of_a_cache():
    """A in blocks, from half precision; with a bias, the last entry of A squared is the number of items."""
    phi = homogeneous(randn(1003, 5, dtype=torch.float16)).numpy()
    a = activation_factor(phi, block=100)
    assert a.dtype == torch.float32
    rows = torch.as_tensor(phi).double()
    assert (rows[:, -1] == 1).all()
    np.testing.assert_allclose(a, rows.T @ rows / math.sqrt(1003), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(a[-1, -1].square(), 1003, rtol=1e-6)


def literal_precision(factors, n, precision, prior):
    """Posterior precision of W (DP, DP) by its definition."""
    eye_a, eye_b = (eye(len(x)) for x in factors[:2])
    if prior == "exact":
        return n * torch.kron(factors.b, factors.a) + precision * torch.kron(eye_b, eye_a)
    b, a = ((n**0.5 * x + precision**0.5 * one) for x, one in ((factors.b, eye_b), (factors.a, eye_a)))
    return torch.kron(b, a)


def covariance(posterior):
    """Covariance of W (DP, DP) from a posterior's eigenbases and variances."""
    basis = torch.kron(posterior.basis, posterior.spectrum.a_basis)
    return basis @ posterior.variance.flatten().diag() @ basis.T


@pytest.mark.parametrize("prior", ["damped", "exact"])
def test_posterior_is_the_literal_one(prior):
    """Its determinant is that of a Kronecker product: each factor's to the power of the other's size."""
    *_, factors = tiny(30)
    posterior = Posterior(factors, 2.0, 4.0, prior, precision=1.7)
    expected = literal_precision(factors, 4.0, 1.7, prior)
    assert relative(covariance(posterior), expected.inverse()) < 1e-10
    np.testing.assert_allclose(-posterior.variance.log().sum(), expected.logdet(), rtol=0, atol=1e-9)
    if prior == "damped":
        a, b = ((2 * x + 1.7**0.5 * eye(len(x))).logdet() for x in factors[:2])
        assert abs(len(factors.b) * a + len(factors.a) * b - expected.logdet()) < 1e-9
        assert abs(len(factors.a) * a + len(factors.b) * b - expected.logdet()) > 1


def test_damped_is_more_than_the_exact_prior():
    """The damped precision exceeds the exact one by sqrt(n lambda) (I (x) A + B (x) I)."""
    *_, factors = tiny(30)
    damped, exact = (covariance(Posterior(factors, 2.0, 4.0, prior, 1.7)).inverse() for prior in ("damped", "exact"))
    eye_a, eye_b = (eye(len(x)) for x in factors[:2])
    expected = (4 * 1.7) ** 0.5 * (torch.kron(eye_b, factors.a) + torch.kron(factors.b, eye_a))
    assert relative(damped - exact, expected) < 1e-10


@pytest.mark.parametrize("prior", ["damped", "exact"])
def test_best_precision_is_where_the_evidence_is_greatest(prior):
    *_, factors = tiny(30)
    size = len(factors.a) * len(factors.b)
    spectrum = decompose(factors)
    best = best_precision(spectrum.a, spectrum.b, 2.0, 4.0, prior)
    log_precision = torch.tensor(math.log(best), dtype=torch.float64, requires_grad=True)

    def evidence(log_precision):
        precision = log_precision.exp()
        log_det = literal_precision(factors, 4.0, precision, prior).logdet()
        return (-precision * 2.0 + size * log_precision - log_det) / 2

    (slope,) = torch.autograd.grad(evidence(log_precision), log_precision)
    assert abs(slope) < 1e-6 * size
    with torch.no_grad():
        assert all(evidence(log_precision + step) < evidence(log_precision) for step in (-3, -0.01, 0.01, 3))


def test_best_precision_refuses_what_has_none():
    some, none = torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3)
    assert best_precision(some, some, 1.0, 1.0) > 0
    assert best_precision(1e-12 * some, some, 1.0, 1.0) > 0
    with pytest.raises(ValueError, match="nearly zero, or"):
        best_precision(none, none, 1.0, 1.0)
    # Two items of five coordinates: the published objective has no maximum for factors of any size.
    few, full = torch.tensor([0.0, 0.0, 0.0, 100.0, 200.0]), torch.tensor([100.0, 150.0, 200.0])
    assert best_precision(few, full, 1.0, 1.0) > 0
    with pytest.raises(ValueError, match="is the published one and the rank of A is too low"):
        best_precision(few, full, 1.0, 1.0, objective="published")
    with pytest.raises(ValueError, match=r"above 0, not 1\.0 and 0\.0"):
        best_precision(some, some, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"above 0, not 0 and 1\.0"):
        best_precision(some, some, 1.0, 0)
    with pytest.raises(ValueError, match="prior must be damped or exact"):
        best_precision(some, some, 1.0, 1.0, "flat")
    with pytest.raises(ValueError, match="defined for the damped prior only"):
        best_precision(some, some, 1.0, 1.0, "exact", "published")
    with pytest.raises(ValueError, match="prior precision must be above 0"):
        Posterior(Factors(torch.eye(2), torch.eye(2), 1), 1.0, precision=0.0)
    with pytest.raises(ValueError, match="not finite"):
        decompose(Factors(torch.full((2, 2), math.nan), torch.eye(2), 1))


@pytest.mark.parametrize("prior", ["damped", "exact"])
@pytest.mark.parametrize("bias", [False, True])
def test_embedding_covariance(prior, bias):
    """It is J Cov(W) J^T, for the damped prior c B~^-1, also with a bias, whose coordinate of phi is 1."""
    phi, seen = randn(5, 4, seed=4), randn(30, 4)
    if bias:
        phi, seen = homogeneous(phi), homogeneous(seen)
    factors = Factors(activation_factor(seen), curvature(randn(9, 3), randn(7, 3, seed=3), SCALE), 30)
    posterior = Posterior(factors, 2.0, 4.0, prior)
    inverse = literal_precision(factors, 4.0, posterior.precision, prior).inverse()
    for s, x in zip(posterior.spread(phi), phi):
        of_map = torch.kron(eye(3), x[None])
        result, expected = posterior.basis @ s.diag() @ posterior.basis.T, of_map @ inverse @ of_map.T
        assert relative(result, expected) < 1e-10
        if prior == "damped":
            root = posterior.precision**0.5
            c = x @ (2 * factors.a + root * eye(len(x))).inverse() @ x
            assert relative(result, c * (2 * factors.b + root * eye(3)).inverse()) < 1e-10
    with pytest.raises(ValueError, match="phi has 9 coordinates"):
        posterior.spread(randn(2, 9))


@pytest.mark.parametrize("prior", ["damped", "exact"])
def test_samples_are_under_one_map(prior):
    """By Monte Carlo, with a bias: covariances within and between items are J Cov(W) J^T of one random W."""
    phi, mean = homogeneous(randn(2, 3, seed=4)), randn(2, 2, seed=5)
    factors = Factors(activation_factor(homogeneous(randn(30, 3))), randn(2, 2) @ randn(2, 2).T, 30)
    posterior = Posterior(factors, 2.0, 4.0, prior)

    def drawn(phi, mean, count):
        return torch.stack(list(posterior.samples(phi, mean, torch.Generator().manual_seed(0), count)))

    draws = drawn(phi, mean, 60_000)
    assert draws.shape == (60_000, 2, 2)
    of_map = torch.cat([torch.kron(eye(2), x[None]) for x in phi])
    expected = of_map @ literal_precision(factors, 4.0, posterior.precision, prior).inverse() @ of_map.T
    assert relative(draws.flatten(1).T.cov(), expected) < 1e-2
    assert (draws.mean(dim=0) - mean).abs().max() < 5 * (expected.max() / 60_000) ** 0.5
    # A pool and a target sampled apart, by equal seeds, are one joint sample.
    apart = [drawn(x[None], m[None], 3) for x, m in zip(phi, mean)]
    torch.testing.assert_close(torch.cat(apart, dim=1), draws[:3])


def test_state_is_tensors_and_restores_the_posterior():
    *_, factors = tiny(30)
    posterior = Posterior(factors, 2.0, 10.0, "exact")
    file = io.BytesIO()
    torch.save(posterior.state(), file)
    file.seek(0)
    again = Posterior.from_state(torch.load(file, weights_only=True))
    phi = randn(6, 4)
    assert torch.equal(again.spread(phi), posterior.spread(phi))
    assert (again.n, again.prior, again.precision, again.norm_sq) == (10.0, "exact", posterior.precision, 2.0)
    restored = again.spectrum.factors
    assert restored.count == 30
    for result, expected in zip(restored[:2], factors[:2]):
        assert relative(result, expected) < 1e-12
    # A spectrum saves the decomposition where only n or the prior changes.
    other = Posterior(posterior.spectrum, 2.0, 4.0)
    assert other.precision == Posterior(factors, 2.0, 4.0).precision
    half = posterior.spread(phi.half())
    assert half.dtype == torch.float64 and relative(half, posterior.spread(phi)) < 1e-3


def test_eigenvalues_below_zero_are_rounding():
    direction = randn(4, 1)
    b = direction @ direction.T - 1e-6 * eye(4)
    spectrum = decompose(Factors(b.float(), b, 1))
    assert isinstance(spectrum, Spectrum) and spectrum.a.dtype == torch.float32
    assert spectrum.a.min() == 0 and spectrum.b.min() == 0


@pytest.fixture
def real(shared):
    """The published ViT-B/32 factors, their spectra, and arrays of three images and 101 prompts."""
    return read_real(shared / "data" / "bayesvlm_vitb32laion.npz")


@lru_cache
def read_real(path):
    published = load_published(path, sizes={"image": (768, 512), "text": (512, 512)})
    return published, {tower: decompose(factors) for tower, factors in published.items()}, np.load(path)


@pytest.mark.parametrize(
    ("prior", "objective", "n", "image", "text"),
    [
        ("damped", "published", 1, 1708.95, 1255.33),
        ("damped", "published", 10, 2997.88, 2538.09),
        ("damped", "correct", 1, 3085.7, 3349.9),
        ("damped", "correct", 4, 3575.3, 3846.1),
        ("damped", "correct", 10, 3913.30, 4180.82),
        ("exact", "correct", 1, 3173.7, 3649.0),
        ("exact", "correct", 4, 4391.4, 4853.1),
        ("exact", "correct", 10, 5062.6, 5433.5),
    ],
)
def test_prior_precisions_of_real_factors(real, prior, objective, n, image, text):
    """Precisions equal the published ones by the published objective, and those of the corrected one."""
    _, spectra, arrays = real
    precisions = [best_precision(s.a, s.b, NORM_SQ[tower], n, prior, objective) for tower, s in spectra.items()]
    np.testing.assert_allclose(precisions, [image, text], rtol=1e-3)
    if (objective, n) == ("published", 1):
        np.testing.assert_allclose(precisions, [arrays["lambda_img"], arrays["lambda_txt"]], rtol=1e-3)


@pytest.mark.parametrize(
    ("objective", "n", "steps", "start", "expected"),
    [
        ("published", 1, 300, {"image": 800, "text": 400}, {"image": 1708.95, "text": 1255.33}),
        ("correct", 10, 1000, {"image": 300, "text": 300}, {"image": 3913.30, "text": 4180.82}),
    ],
)
def test_published_optimizer_ends_at_the_published_precisions(real, objective, n, steps, start, expected):
    """Adam on log lambda, as published, ends at the published precisions, even where it stops before the root."""
    _, spectra, _ = real
    for tower, spectrum in spectra.items():
        a, b = spectrum.a.double(), spectrum.b.double()
        p, d = len(a), len(b)
        log_precision = torch.tensor(math.log(start[tower]), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([log_precision], lr=1e-2)
        for _ in range(steps):
            precision = log_precision.exp()
            det_a, det_b = ((n**0.5 * x + precision.sqrt()).log().sum() for x in (a, b))
            log_det = p * det_a + d * det_b if objective == "published" else (d * det_a + p * det_b) / 2
            loss = precision * NORM_SQ[tower] / 2 - p * d * log_precision / 2 + log_det
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        np.testing.assert_allclose(log_precision.exp().item(), expected[tower], rtol=1e-4)


def test_half_precision_activations_are_enough(real):
    """On real factors, variances from float16 activations differ by less than 1e-3, from float32 by 1e-4."""
    published, spectra, arrays = real
    for tower, name in (("image", "img"), ("text", "text")):
        spectrum = Spectrum(*(part.double() for part in spectra[tower][:4]), spectra[tower].count)
        posterior = Posterior(spectrum, NORM_SQ[tower], 4)
        phi = torch.as_tensor(arrays[f"food101_{name}_activation"]).double()
        full, half = posterior.spread(phi), posterior.spread(phi.half())
        assert ((half - full).abs() / full).max() < 1e-3
        single = Posterior(spectra[tower], NORM_SQ[tower], 4).spread(phi.float())
        assert ((single - full).abs() / full).max() < 1e-4
    assert published["text"].count == 327_680


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Published files of a small model in their own layout, A saved from a GPU."""
    generator = torch.Generator().manual_seed(0)
    for tower, p in (("img", 6), ("txt", 4)):
        for side, size in (("A", p), ("B", 3)):
            root = torch.randn(size, size, generator=generator)
            with monkeypatch.context() as patch:
                if side == "A":
                    patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
                torch.save(root @ root.T + 1e-7 * root, tmp_path / f"{side}_{tower}_analytic.pt")
    return tmp_path


def test_published_folder(folder):
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(folder / "A_img_analytic.pt", weights_only=True)
    towers = load_published(folder, sizes={"image": (6, 3), "text": (4, 3)})
    assert list(towers) == ["image", "text"]
    for factors in towers.values():
        assert factors.count == 327_680
        assert all(torch.equal(x, x.T) and x.device.type == "cpu" for x in factors[:2])
        Posterior(factors, 1.0, 4.0)


class Pickled:
    """An object that a file of tensors must not contain."""


def test_unusable_published_files_are_refused(folder, tmp_path):
    def message(path, **options):
        with pytest.raises(UserError) as stop:
            load_published(path, **options)
        assert "\n" not in str(stop.value)
        return str(stop.value)

    assert "is not there" in message(tmp_path / "absent.npz")
    of_sizes = message(folder, sizes={"image": (6, 3), "text": (5, 3)})
    assert "text factors" in of_sizes and "belong to another model" in of_sizes
    file, content = folder / "B_txt_analytic.pt", (folder / "B_txt_analytic.pt").read_bytes()
    for value, expected in [
        (torch.eye(4), "have sizes 3 and 4"),
        (torch.ones(3, 4), "square matrix, not (3, 4)"),
        ({"B": torch.eye(3)}, "square matrix, not dict"),
        (torch.full((3, 3), math.nan), "finite floating-point numbers only"),
        (torch.eye(3, dtype=torch.long), "finite floating-point numbers only"),
        (Pickled(), "more than a tensor"),
    ]:
        torch.save(value, file)
        assert expected in message(folder)
    file.write_bytes(content[:100])
    assert "damaged" in message(folder)
    file.unlink()
    assert "has no B_txt_analytic.pt" in message(folder)
    archive = tmp_path / "some.npz"
    np.savez(archive, A_img=np.eye(2), B_img=np.eye(2), A_txt=np.eye(2))
    assert "has no B_txt" in message(archive)
    archive.write_bytes(archive.read_bytes()[:60])
    assert "damaged" in message(archive)
    with open(archive, "wb") as plain:
        np.save(plain, np.eye(2))
    assert "damaged or not an .npz file" in message(archive)


def laplace_torch(model, phi, kind, backend="CurvlinopsGGN"):
    """laplace-torch's Kronecker approximation of a model's loss, all items in one batch."""
    laplace = pytest.importorskip("laplace")
    curvature_of = getattr(pytest.importorskip("laplace.curvature"), backend)
    pairs = torch.utils.data.TensorDataset(phi, torch.zeros(len(phi), dtype=torch.long))
    fitted = getattr(laplace, kind)(
        model, "classification", prior_precision=1.7, temperature=0.25, backend=curvature_of
    )
    fitted.fit(torch.utils.data.DataLoader(pairs, batch_size=len(phi)))
    return fitted


@pytest.mark.filterwarnings("ignore")  # of its imports
def test_agrees_with_laplace_torch_on_a_softmax_of_linear_logits():
    """Its Kronecker last layer has B = sum H and A = mean of phi phi^T, so its B (x) A equals ours.

    Its temperature is 1/n. Its version 0.3 drops `damping` from a posterior, so its matrices are tested for that.
    """
    phi, linear = randn(12, 4), torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(randn(3, 4, seed=1))
    theirs = laplace_torch(torch.nn.Sequential(torch.nn.Identity(), linear), phi, "KronLLLaplace")
    pi = (phi @ linear.weight.T.detach()).softmax(dim=-1)
    b = (torch.diag_embed(pi) - pi[:, :, None] * pi[:, None]).sum(dim=0) / math.sqrt(12)
    ours = Factors(activation_factor(phi), b, 12)
    ((their_b, their_a),) = theirs.H_facs.kfacs
    assert relative(their_b / math.sqrt(12), ours.b) < 1e-10 and relative(their_a * math.sqrt(12), ours.a) < 1e-10
    exact = Posterior(ours, 1.0, 4.0, "exact", 1.7)
    assert relative(covariance(exact), theirs.posterior_precision.to_matrix(exponent=-1)) < 1e-10
    _, variance = theirs._glm_predictive_distribution(phi)
    assert relative(posterior_covariances(exact, phi), variance) < 1e-10

    matrix = pytest.importorskip("laplace.utils.matrix")
    scaled = (matrix.Kron([[ours.b, ours.a]]) * 4.0).decompose()
    delta = torch.tensor([1.7], dtype=torch.float64)
    damped = matrix.KronDecomposed(scaled.eigenvectors, scaled.eigenvalues, delta, damping=True)
    posterior = Posterior(ours, 1.0, 4.0, "damped", 1.7)
    assert relative(covariance(posterior), damped.to_matrix(exponent=-1)) < 1e-10
    np.testing.assert_allclose(-posterior.variance.log().sum(), damped.logdet(), rtol=1e-10)


def posterior_covariances(posterior, phi):
    return posterior.basis @ torch.diag_embed(posterior.spread(phi)) @ posterior.basis.T


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_laplace_torch_through_the_cosine():
    """Kronecker factors and covariance of a linear map followed by cosines to candidates and a temperature."""

    class Cosines(torch.nn.Module):
        def forward(self, g):
            return SCALE * F.normalize(g, dim=-1) @ F.normalize(target, dim=-1).T

    phi, target = randn(12, 4), randn(5, 3, seed=2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False, dtype=torch.float64), Cosines())
    theirs = laplace_torch(model, phi, "KronLaplace")
    b = curvature(model[0](phi).detach(), target, SCALE) / math.sqrt(12)
    ours = Factors(activation_factor(phi), b, 12)
    ((their_b, their_a),) = theirs.H_facs.kfacs
    assert relative(their_b / math.sqrt(12), ours.b) < 1e-10 and relative(their_a * math.sqrt(12), ours.a) < 1e-10
    posterior = Posterior(ours, 1.0, 4.0, "exact", 1.7)
    assert relative(covariance(posterior), theirs.posterior_precision.to_matrix(exponent=-1)) < 1e-10
