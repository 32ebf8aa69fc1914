"""BayesVLM: train.py and eval.py compute its formulas, and invalid options and factors are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from check_method import Drawn
from conftest import POOLED, homogeneous, made_once, share_pooled, write_classes
from fresh import printed

import cache_embeddings
import eval as evaluation
import reproduce
import train
import uncertainty
from benchmarks import factor_trace
from datasets.embeddings import Pairs, all_seen
from models import bayesvlm, prob_cosine
from models.base import adapt_all, cosine
from models.bayesvlm import BayesVLM, draw_pairs
from models.laplace import Factors, Posterior, activation_factor, best_precision, curvature
from reporting import evaluations
from reporting.tables.classification import classification
from reproduce import Cell
from tasks.classification import class_embeddings
from utils.checkpoint import Run
from utils.config import load_config, make_adaptor
from utils.errors import UserError

RUN = ["--dataset", "shapes", "--method", "bayesvlm", "--device", "cpu"]
TRAIN = [*RUN, "--quiet", "--set", "model.candidates=160"]
CLASSES = ["--dataset", "folder", "--backbone", "shapes-tiny", "--device", "cpu"]
FOLDER = "shapes/shapes-tiny/{}/seed0"


@pytest.fixture(scope="module")
def sorted_world(pooled_world, tmp_path_factory):
    """A folder where a small `shapes`, and its val images in folders by shape, are cached with pooled features."""

    def make():
        share_pooled(pooled_world)
        write_classes(Path("drawn"))
        templates = "data.options.templates=['a photo of a {}', 'a {}', 'there is a {}']"
        cache_embeddings.main([*CLASSES, "--root", "drawn", *POOLED, "--set", templates])

    return made_once(tmp_path_factory, "sorted", make)


@pytest.fixture
def place(sorted_world, tmp_path, monkeypatch):
    for name in ("embeddings", "data", "drawn"):
        (tmp_path / name).symlink_to(sorted_world / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def drawn(images=40, texts=90, dim=16, **options):
    return Drawn(normal(images, dim, seed=1, scale=3), normal(texts, dim, seed=2, scale=2), **options)


def prepared(pairs, **options):
    torch.manual_seed(0)
    adaptor = BayesVLM(pairs.dim, **options)
    adaptor.prepare(pairs, quiet=True)
    return adaptor.eval()


def adapted(adaptor, pairs):
    return [
        adapt_all(adapt, pairs.fed(side, True), "cpu")
        for side, adapt in (("image", adaptor.adapt_image), ("text", adaptor.adapt_text))
    ]


def literal_curvature(source, target, scale):
    """sum_i H_i, item by item, by definition."""
    target = target / target.norm(dim=1, keepdim=True)
    total = 0.0
    for g in source:
        x = g / g.norm()
        c = (scale * target @ x).softmax(dim=0)
        jacobian = (torch.eye(len(g)).double() - torch.outer(x, x)) / g.norm()
        middle = target.T @ (torch.diag(c) - torch.outer(c, c)) @ target
        total = total + scale**2 * jacobian @ middle @ jacobian
    return total


def test_train_and_eval_compute_the_formulas(place, monkeypatch):
    """Two batches of 150 images with a caption each, against float64 by definition from the cached arrays."""
    chosen = []
    with monkeypatch.context() as patch:
        patch.setattr("models.bayesvlm.draw_pairs", lambda *args: chosen.append(draw_pairs(*args)) or chosen[-1])
        train.main(TRAIN)
    evaluation.main([*RUN, "--quiet"])
    pairs, val = (Pairs("shapes", "shapes-tiny", split) for split in ("train", "val"))
    [(images, texts)] = chosen
    assert sorted(images) == list(range(300)) and (pairs.image_of_text[texts] == images).all()
    assert set(texts - 5 * images) == set(range(5))  # not always the first of an image's captions
    rows, scale = {"image": images, "text": texts}, pairs.meta["logit_scale"]
    z = {side: torch.tensor(np.array(getattr(pairs, side))).double() for side in rows}
    sides = {}
    for side, other in (("image", "text"), ("text", "image")):
        phi = torch.tensor(np.array(pairs._array(f"{side}_pooled"))).double()
        weight, bias = (pairs.projection.get(f"{side}_{name}") for name in ("weight", "bias"))
        phi = phi if bias is None else homogeneous(phi)
        b = sum(literal_curvature(z[side][rows[side][k::2]], z[other][rows[other][k::2]], scale) for k in (0, 1))
        a = phi[rows[side]].T @ phi[rows[side]]
        norm_sq = (weight.astype(float) ** 2).sum() + (0 if bias is None else (bias.astype(float) ** 2).sum())
        a, b = a / 300**0.5, b / 300**0.5
        precision = best_precision(torch.linalg.eigvalsh(a), torch.linalg.eigvalsh(b), norm_sq, 4)
        of_a, of_b = (2 * x + precision**0.5 * torch.eye(len(x)).double() for x in (a, b))
        phi = torch.tensor(np.array(val._array(f"{side}_pooled"))).double()
        phi = phi if bias is None else homogeneous(phi)
        mean = torch.tensor(np.array(getattr(val, side))).double()
        assert phi.shape[1] == len(a) and (bias is None) == (side == "text")
        c = (phi * torch.linalg.solve(of_a, phi.T).T).sum(dim=1)
        sides[side] = mean, c[:, None] * of_b.inverse().diagonal()
    (g, v_g), (h, v_h) = sides.values()
    lengths = [mean.square().sum(dim=1) + v.sum(dim=1) for mean, v in sides.values()]
    both = torch.outer(*lengths)
    variance = scale**2 * ((g.square() + v_g) @ v_h.T + v_g @ h.square().T) / both
    score = scale * (g @ h.T) / both.sqrt() / (1 + torch.pi / 8 * variance).sqrt()
    result = json.loads((place / "results" / FOLDER.format("bayesvlm") / "shapes-retrieval.json").read_text())
    arrays = np.load(place / "results" / FOLDER.format("bayesvlm") / "shapes-retrieval.npz")
    for side, (mean, v) in sides.items():
        expected = v.sum(dim=1) / mean.square().sum(dim=1)
        np.testing.assert_allclose(arrays[f"{side}_uncertainty"], expected, rtol=2e-4)
    np.testing.assert_allclose(arrays["text_to_image_score"], score.amax(dim=0), rtol=2e-4)
    np.testing.assert_allclose(arrays["image_to_text_score"], score.amax(dim=1), rtol=2e-4)
    entropy = torch.distributions.Categorical(logits=score.T).entropy()
    np.testing.assert_allclose(arrays["text_to_image_entropy"], entropy, rtol=1e-3)
    hits = (score.argmax(dim=0).numpy() == val.image_of_text).mean()
    assert result["text_to_image"]["recall"]["1"] == pytest.approx(hits, abs=2e-3)
    assert result["posterior_scale"] == 1 and result["image_to_text"]["levels_by"] == "query"
    assert result["seen_in_training"] == 0 and "query" in result["hierarchy"]["uncertainty"]


def test_candidates_of_the_factors_are_no_answers_to_compare(place):
    """`--task unanswerable` compares none, neither of its own captions nor of absent ones."""
    train.main(TRAIN)
    Path("absent.txt").write_text("a dog on a sofa\na city at night\n")
    evaluation.main([*RUN, "--quiet", "--task", "unanswerable", "--absent", "absent.txt"])
    path = place / "results" / FOLDER.format("bayesvlm") / "shapes-unanswerable.json"
    side = json.loads(path.read_text())["text_to_image"]
    for rejection in (side["rejection"], side["absent"]["rejection"]):
        assert rejection.keys() >= {"top", "retrieved"} and "information" not in rejection


@pytest.mark.parametrize("prior", ["damped", "exact"])
@pytest.mark.parametrize(("bias", "logit_bias"), [(True, -5.0), (False, None)])
def test_both_losses_and_maps_with_and_without_a_bias(bias, logit_bias, prior):
    """The posterior equals that of models/laplace.py of all images in one batch; A's last entry is their number."""
    pairs = drawn(texts=40, bias=bias, logit_bias=logit_bias)
    adaptor = prepared(pairs, prior=prior)
    z = {side: torch.tensor(getattr(pairs, side)).double() for side in ("image", "text")}
    for side, other in (("image", "text"), ("text", "image")):
        phi = torch.tensor(pairs._array(f"{side}_pooled")).double()
        phi = homogeneous(phi) if bias else phi
        loss = ("siglip", -5.0) if logit_bias else ("infonce", 0.0)
        b = curvature(z[side], z[other], 20.0, loss[1], loss[0]) / 40**0.5
        factors = Factors(activation_factor(phi), b, 40)
        parts = (pairs.projection.get(f"{side}_{name}", np.zeros(1)) for name in ("weight", "bias"))
        direct = Posterior(factors, sum((part**2).sum() for part in parts), prior=prior)
        posterior = getattr(adaptor, side).posterior
        assert posterior.precision == pytest.approx(direct.precision, rel=1e-4) and posterior.spectrum.count == 40
        a = posterior.spectrum.factors.a
        assert len(a) == phi.shape[1] and (not bias or a[-1, -1].item() ** 2 == pytest.approx(40, rel=1e-4))
        covariance = [p.basis @ torch.diag(p.spread(phi[:1])[0].to(p.basis)) @ p.basis.T for p in (posterior, direct)]
        torch.testing.assert_close(covariance[0].double(), covariance[1], rtol=1e-3, atol=1e-3 * covariance[1].max())


@pytest.mark.parametrize("variance", ["diagonal", "kronecker", "tangent"])
def test_scores_are_prob_cosine_and_any_block_gives_the_same(variance, monkeypatch):
    pairs = drawn()
    adaptor = prepared(pairs, variance=variance, prior="exact").double()
    image, text = (
        adapt(torch.from_numpy(pairs.fed(side, True)[:]).double())
        for side, adapt in (("image", adaptor.adapt_image), ("text", adaptor.adapt_text))
    )
    sides = (image.mean, image.spread, adaptor.image.b_basis), (text.mean, text.spread, adaptor.text.b_basis)
    mean = prob_cosine.cosine_mean(*sides)
    factor = prob_cosine.probit_factor(400 * prob_cosine.cosine_variance(*sides, variance))
    torch.testing.assert_close(adaptor.similarity(image, text), mean)
    torch.testing.assert_close(adaptor.log_likelihood(image, text), 20 * factor * mean)
    sigma = sides[0][2] @ torch.diag(image.spread[3]) @ sides[0][2].T
    assert image.uncertainty[3].item() == pytest.approx((sigma.trace() / image.mean[3].square().sum()).item())
    plain = cosine(image, text)
    assert adaptor.matched_scale(image, text) == pytest.approx((20 * factor * mean / plain).mean().item(), rel=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(bayesvlm, "TILE", 300)
        tiled = adaptor.matched_scale(image, text)
    assert tiled == pytest.approx(adaptor.matched_scale(image, text), rel=1e-12)
    calls, of_half = [], prob_cosine.half
    monkeypatch.setattr(bayesvlm, "half", lambda *args, **more: calls.append(0) or of_half(*args, **more))
    parts = [adaptor.log_likelihood(image.rows(slice(k, k + 8)), text) for k in range(0, 40, 8)]
    assert len(calls) == 5  # the gallery's is cached
    torch.testing.assert_close(torch.cat(parts), 20 * factor * mean, rtol=1e-12, atol=1e-12)


def test_no_tensor_is_pairs_by_dimensions():
    """Extra MB of 128 images against 20,000 captions at D = 512: N x M x D would be 5.2 GB, the gallery has 41 MB."""
    code = """
import resource
import torch
from models.base import Embedding
from models.bayesvlm import BayesVLM, draw_pairs

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
adaptor = BayesVLM(512, variance="diagonal")
for tower in (adaptor.image, adaptor.text):
    tower.b_basis = torch.linalg.qr(torch.randn(512, 512)).Q
adaptor.logit_scale.fill_(100.0)
image, text = (Embedding(torch.randn(n, 512), None, torch.rand(n, 512)) for n in (256, 20000))
before = peak()
with torch.inference_mode():
    for start in (0, 128):
        assert adaptor.log_likelihood(image.rows(slice(start, start + 128)), text).isfinite().all()
print(peak() - before)
"""
    assert float(printed(code)) < 500


def test_classes_by_joint_and_independent_draws():
    """Joint draws are the same for any block of images, and near the probabilities of many draws."""
    pairs = drawn(texts=12)
    confidence = {}
    for kind in ("mean", "probit", "mc-independent", "mc-joint"):
        adaptor = prepared(pairs, probabilities=kind, draws=400, n=0.5)
        image, text = adapted(adaptor, pairs)
        score = adaptor.classify(image, text)
        confidence[kind] = score.softmax(dim=1).amax(dim=1).mean().item()
        again = prepared(pairs, n=0.5, probabilities="mean" if kind == "mean" else "probit")
        pair_score = again.log_likelihood(*adapted(again, pairs))
        torch.testing.assert_close(adaptor.log_likelihood(image, text), pair_score)
        if not kind.startswith("mc"):
            torch.testing.assert_close(score, pair_score)
            continue
        torch.testing.assert_close(score.exp().sum(dim=1), torch.ones(40))
        assert (adaptor.classify(image, text) == score).all()
        if kind == "mc-joint":
            part = adaptor.classify(image.rows(slice(5, 9)), text)
            torch.testing.assert_close(part, score[5:9], rtol=1e-4, atol=1e-5)
            many = prepared(pairs, probabilities=kind, draws=3000, n=0.5)
            torch.testing.assert_close(many.classify(image, text).exp(), score.exp(), rtol=0, atol=0.08)
    assert confidence["mean"] > confidence["mc-joint"] > 1 / 12 and confidence["mean"] > confidence["probit"]


def test_joint_draws_of_the_towers_are_independent():
    """Against Monte Carlo of two dense Gaussians; with the same noise for both towers, the first class is 0.4 off.

    Both maps have one posterior. Classes 0 and 1 have the same embedding, and phi toward and away from the image's, so
    only dependence between the towers' draws could make their probabilities differ.
    """
    rng, count, scale, root = np.random.default_rng(0), 50_000, 6.0, 3.0**0.5
    a, b = (x @ x.T for x in (rng.normal(size=(3, 3)), rng.normal(size=(4, 4))))
    phi, mean, other = rng.normal(size=3), *rng.normal(size=(2, 4))
    rows = {"image": (mean[None], phi[None]), "text": (np.stack([mean, mean, other]), np.stack([phi, -phi, 0 * phi]))}
    adaptor = BayesVLM(4, probabilities="mc-joint", draws=4000).double()
    adaptor.logit_scale.fill_(scale)
    precision = np.kron(b + root * np.eye(4), a + root * np.eye(3))  # n = 1
    drawn, embedded = {}, []
    for side, adapt in (("image", adaptor.adapt_image), ("text", adaptor.adapt_text)):
        posterior = Posterior(Factors(torch.from_numpy(a), torch.from_numpy(b), 30), 1.0, 1.0, precision=3.0)
        getattr(adaptor, side).store(posterior)
        embedded.append(adapt(torch.from_numpy(np.hstack(rows[side]))))
        moved = rng.multivariate_normal(np.zeros(12), np.linalg.inv(precision), count).reshape(count, 4, 3)
        z = rows[side][0] + rows[side][1] @ moved.transpose(0, 2, 1)
        drawn[side] = z / np.linalg.norm(z, axis=2, keepdims=True)
    logit = scale * (drawn["image"] * drawn["text"]).sum(axis=2)
    expected = (np.exp(logit) / np.exp(logit).sum(axis=1, keepdims=True)).mean(axis=0)
    assert expected[0] == pytest.approx(expected[1], abs=0.01)
    np.testing.assert_allclose(adaptor.classify(*embedded).exp()[0], expected, atol=0.02)


def test_published_factors(shared, tmp_path):
    """ViT-B/32's factors and |W|^2 give its known precisions (n = 4; reference: n = 10, faulty evidence)."""
    path = shared / "data" / "bayesvlm_vitb32laion.npz"
    pairs = Drawn(normal(4, 512), normal(4, 512), widths=(768, 512), bias=False)
    for side, norm_sq in (("image", 63.6576), ("text", 42.1238)):
        weight = pairs.projection[f"{side}_weight"]
        pairs.projection[f"{side}_weight"] = weight * (norm_sq**0.5 / np.linalg.norm(weight))
    for preset, expected in (("default", (3575.3, 3846.1)), ("reference", (2997.9, 2538.1))):
        config = load_config("coco", "bayesvlm", preset=preset, settings=[f"model.factors={path}"])
        adaptor = make_adaptor(config, 512)
        assert adaptor.prepare(pairs) is None
        precision = [getattr(adaptor, side).posterior.precision for side in ("image", "text")]
        assert precision == pytest.approx(expected, rel=1e-3)
        assert torch.isfinite(adaptor.log_likelihood(*adapted(adaptor, pairs))).all()
    other = Drawn(normal(4, 512), normal(4, 512), widths=(768, 512), bias=True)
    with pytest.raises(UserError, match=r"image factors in .* have sizes 768 and 512, .* 769 and 512"):
        adaptor.prepare(other)
    with pytest.raises(UserError, match=r"is not there: give the folder or the \.npz"):
        BayesVLM(512, factors=str(tmp_path / "none.npz")).prepare(pairs)


def test_factors_of_another_run(place, refusal):
    """The same posterior without gathering, another with another n; the images behind the factors stay known."""
    train.main(TRAIN)
    first_path = place / "checkpoints" / FOLDER.format("bayesvlm") / "adaptor.pt"
    flags = ["--dataset", "shapes", "--method", "bayesvlm", "--device", "cpu", "--quiet"]
    for tag, settings in (("same", []), ("ten", ["model.n=10"])):
        settings = [f"model.factors={first_path}", "data.train_split=val", *settings]
        train.main([*flags, "--tag", tag, "--set", *settings])
    first = Run(load_config("shapes", "bayesvlm")).load("cpu")[0]
    for tag, n in (("same", 4), ("ten", 10)):
        run = Run(load_config("shapes", "bayesvlm", tag=tag))
        adaptor = run.load("cpu")[0]
        assert len(run.seen["image_id"]) == 300 and adaptor.text.n == n
        assert torch.equal(adaptor.text.b, first.text.b)
        assert torch.equal(adaptor.text.precision, first.text.precision) == (tag == "same")
    clip = ["--dataset", "shapes", "--method", "clip", "--device", "cpu", "--quiet"]
    train.main(clip)
    path = place / "checkpoints" / FOLDER.format("clip") / "adaptor.pt"
    error = refusal(train.main, *flags, "--tag", "clips", "--set", f"model.factors={path}")
    assert "has no factors: it must be a run of the same method" in error
    saved = torch.load(first_path, weights_only=True)
    saved["identity"]["encoder_fingerprint"] = "other"
    torch.save(saved, place / "other.pt")
    error = refusal(train.main, *flags, "--tag", "other", "--set", "model.factors=other.pt")
    assert "has the factors of another backbone" in error


def test_embeddings_from_elsewhere_are_refused_without_advice_that_leads_nowhere(tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(20, 8))
    np.savez("pairs.npz", image=rows, text=rows)
    for backbone in ("given", "shapes-tiny"):
        cache = ["--dataset", "embeddings", "--root", "pairs.npz", "--backbone", backbone]
        cache_embeddings.main([*cache, "--quiet", "--splits", "train0"])
        error = refusal(train.main, "--dataset", "embeddings", "--method", "bayesvlm", "--backbone", backbone)
        assert "without the inputs of the model's last projections, which this needs: choose another method" in error
        assert "leave out --features pooled" in refusal(cache_embeddings.main, *cache, "--features", "pooled")


def test_a_cache_without_pooled_features_is_refused(place, small_world, refusal):
    train.main(TRAIN)
    (place / "embeddings").unlink()
    (place / "embeddings").symlink_to(small_world / "embeddings")
    remedy = "--features pooled --overwrite`, with --root if"
    error = refusal(train.main, *TRAIN, "--tag", "other")
    assert "train has no pooled features, which this needs: run `python cache_embeddings.py --dataset shapes" in error
    assert remedy in error and not list(place.glob("checkpoints/**/bayesvlm+other/seed0/adaptor.pt"))
    assert remedy in refusal(evaluation.main, *RUN)
    assert remedy in refusal(evaluation.main, *RUN, "--task", "hierarchy")
    (place / "embeddings").unlink()  # without a cache, the message gives the command for a usable one
    assert "--splits train --features pooled`, with --root if" in refusal(train.main, *TRAIN, "--tag", "other")


def test_a_killed_run_ends_with_the_same_weights(place, monkeypatch):
    train.main([*TRAIN, "--tag", "whole"])
    calls = []

    def killed(*args, **options):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return curvature(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(bayesvlm, "curvature", killed)
        train.main(TRAIN)
    folder = place / "checkpoints" / FOLDER.format("bayesvlm")
    assert not (folder / "adaptor.pt").exists()
    torch.manual_seed(1234)  # the state before training does not matter
    train.main(TRAIN)
    whole = place / "checkpoints" / FOLDER.format("bayesvlm+whole")
    states = [torch.load(path / "adaptor.pt", weights_only=True)["state_dict"] for path in (folder, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)


def test_images_behind_the_factors_count_as_seen(place, refusal):
    few = ["data.train_split=val", "model.candidates=20", "model.batches=2"]
    train.main([*RUN, "--quiet", "--set", *few])
    message = refusal(evaluation.main, *RUN)
    assert "was trained on 40 of the 100 images of shapes 'val'" in message
    evaluation.main([*RUN, "--quiet", "--allow-leakage"])
    result = json.loads((place / "results" / FOLDER.format("bayesvlm") / "shapes-retrieval.json").read_text())
    assert result["seen_in_training"] == 40
    train.main([*RUN, "--quiet", "--tag", "some", "--set", *few, "train.val_fraction=0.3"])
    run = Run(load_config("shapes", "bayesvlm", tag="some"))
    adaptor = run.load("cpu")[0]
    assert adaptor.posterior_scale != 1 and adaptor.image.count == 40
    assert len(set(run.seen["image_id"].tolist())) == 100  # nothing is trained, so all pairs calibrate


def test_images_seen_in_two_places_are_joined():
    one = {"id_space": "a", "image_id": torch.tensor([1, 5])}
    two = {"id_space": "a", "image_id": torch.tensor([5, 2])}
    none, other = {"id_space": "b", "image_id": torch.tensor([], dtype=torch.int64)}, {**two, "id_space": "b"}
    assert all_seen(one, two)["image_id"].tolist() == [1, 2, 5]
    assert all_seen(one, None)["image_id"].tolist() == [1, 5]
    assert all_seen(none, one)["id_space"] == "a" and all_seen(none, None)["id_space"] == "b"
    with pytest.raises(UserError, match=r"another source's images .* train with --val-fraction 0"):
        all_seen(one, other)


def test_uncertainty_of_prompts_and_images_equals_that_of_the_cache(place, capsys):
    """The image tower's last map has a bias, the text tower's has none."""
    train.main(TRAIN)
    adaptor = Run(load_config("shapes", "bayesvlm")).load("cpu")[0]
    val = Pairs("shapes", "shapes-tiny", "val")
    image, text = adapted(adaptor, val)
    items = [*val.items["text"][:3], *val.items["image"][:2]]
    capsys.readouterr()
    uncertainty.main([*RUN, *items, "--json"])
    printed = [row["uncertainty"] for row in json.loads(capsys.readouterr().out)]
    expected = [*text.uncertainty[:3].tolist(), *image.uncertainty[:2].tolist()]
    assert printed == pytest.approx(expected, rel=1e-2)  # other batches, rounded to float16


def test_prompts_are_averaged_with_the_inputs_of_their_map(place):
    pairs = Pairs("folder", "shapes-tiny", "all")
    alone, joined = class_embeddings(pairs), class_embeddings(pairs, pooled=True, block=4)
    weight = pairs.projection["text_weight"]
    np.testing.assert_allclose(joined[:, : pairs.dim], alone, rtol=1e-5)
    np.testing.assert_allclose(joined[:, pairs.dim :] @ weight.T, alone, atol=2e-3 * np.abs(alone).max())
    labeled = drawn(texts=90)
    labeled.class_of_text, labeled.meta["classes"] = np.arange(90) % 7, list("abcdefg")
    labeled.text = homogeneous(torch.from_numpy(labeled._array("text_pooled"))).numpy() @ np.concatenate(
        [labeled.projection["text_weight"].T, labeled.projection["text_bias"][None]]
    ).astype(np.float32)
    joined = class_embeddings(labeled, pooled=True)
    whole = np.concatenate([labeled.projection["text_weight"], labeled.projection["text_bias"][:, None]], axis=1)
    np.testing.assert_allclose(joined[:, 16:] @ whole.T, joined[:, :16], rtol=1e-3, atol=1e-3)


def test_classification_has_a_temperature_matched_to_its_own(place, capsys):
    for tag in ("", "joint", "independent"):
        name = ["--tag", tag] if tag else []
        draws = ["model.draws=20", f"model.probabilities=mc-{tag}"] if tag else []
        train.main([*RUN, "--quiet", *name, "--set", "model.candidates=160", *draws])
        evaluation.main([*CLASSES, "--train-dataset", "shapes", "--method", "bayesvlm", *name, "--score", "both"])
    train.main(["--dataset", "shapes", "--method", "clip", "--device", "cpu", "--quiet", "--val-fraction", "0"])
    evaluation.main([*CLASSES, "--train-dataset", "shapes", "--method", "clip"])
    capsys.readouterr()
    results_of = {path.parts[-3]: json.loads(path.read_text()) for path in place.glob("results/**/*.json")}
    side = results_of["bayesvlm"]["image_to_class"]
    pairs = Pairs("folder", "shapes-tiny", "all")
    adaptor = Run(load_config("shapes", "bayesvlm")).load("cpu")[0]
    image = adapt_all(adaptor.adapt_image, pairs.fed("image", True), "cpu")
    prompt = adapt_all(adaptor.adapt_text, class_embeddings(pairs, True), "cpu")
    matched = adaptor.matched_scale(image, prompt)
    assert matched < pairs.meta["logit_scale"] and side["calibration"]["matched"]["scales"] == pytest.approx([matched])
    probability = (matched * cosine(image, prompt)).softmax(dim=1)
    nll = -probability[range(100), np.array(pairs.label)].log().mean().item()
    assert side["calibration"]["matched"]["nll"] == pytest.approx(nll, rel=1e-4)
    right = (probability.argmax(dim=1).numpy() == pairs.label).mean()
    plain = results_of["clip"]["image_to_class"]
    assert side["calibration"]["matched"]["accuracy"] == pytest.approx(right) == plain["recall"]["1"]
    assert "matched" not in plain["calibration"]
    logit = adaptor.log_likelihood(image, prompt)
    assert side["recall"]["1"] == pytest.approx((logit.argmax(dim=1).numpy() == pairs.label).mean())
    # Logarithms of probabilities are evaluated without a temperature.
    for tag in ("joint", "independent"):
        run = Run(load_config("shapes", "bayesvlm", tag=tag)).load("cpu")[0]
        image = adapt_all(run.adapt_image, pairs.fed("image", True), "cpu")
        prompt = adapt_all(run.adapt_text, class_embeddings(pairs, True), "cpu")
        nll = -run.classify(image, prompt)[range(100), np.array(pairs.label)].mean().item()
        part = results_of[f"bayesvlm+{tag}"]["image_to_class"]
        assert part["calibration"]["model"]["nll"] == pytest.approx(nll, rel=1e-4)
        assert part["uncertainty"]["query"]["family"] == "query-only"
    [_, block] = evaluations.read(place / "results")  # the first part is the Comparison
    table = classification(block)
    names = [row.name for _, rows in table.groups for row in rows]
    assert names[:2] == ["clip", "clip + temperature"] and "Matched temperature" in table.note
    assert [name for name in names if name.startswith("bayesvlm ") or name == "bayesvlm"] == [
        "bayesvlm", "bayesvlm + temperature", "bayesvlm + matched temperature",
    ]  # fmt: skip
    cells = {row.name: row.cells for _, rows in table.groups for row in rows}
    assert cells["bayesvlm + matched temperature"]["acc"].mean == pytest.approx(100 * right)
    assert cells["bayesvlm + matched temperature"].get("top5") is None


@pytest.mark.parametrize("kind", ["probit", "mc-joint"])
def test_classes_beyond_memory_are_scored_by_blocks(place, monkeypatch, kind):
    train.main([*TRAIN, f"model.probabilities={kind}", "model.draws=10"])
    evaluate = [*CLASSES, "--train-dataset", "shapes", "--method", "bayesvlm", "--quiet"]
    evaluation.main(evaluate)
    [path] = place.glob("results/**/*.json")
    whole, arrays = json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz")))
    monkeypatch.setattr("tasks.classification.STORED_SCORES", 0)
    monkeypatch.setattr("metrics.score_tiles.TILE", 100)
    evaluation.main(evaluate)
    by_blocks, parts = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    for name, values in arrays.items():
        rtol = 2e-2 if "temperature" in name else 1e-3  # the search for a temperature stops within a thousandth
        np.testing.assert_allclose(parts[name], values, rtol=rtol, atol=1e-5)
    for name, figures in whole["image_to_class"]["calibration"].items():
        nll = by_blocks["image_to_class"]["calibration"][name]["nll"]
        assert nll == pytest.approx(figures["nll"], rel=1e-3)


def test_a_grid_caches_what_its_methods_need(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for methods, wanted in ((["clip"], False), (["clip", "bayesvlm"], True)):
        cells = [Cell(load_config("shapes", method), ["shapes"]) for method in methods]
        [[(script, words)]] = reproduce.caching(cells, []).values()
        assert script == "cache_embeddings" and ("--features=pooled" in words) == wanted
    config = load_config("embeddings", "bayesvlm")
    assert not Cell(config, ["embeddings"]).pooled  # they have none, and training refuses them


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.prior=flat"], "prior must be damped or exact, not 'flat'"),
        (["model.evidence=wrong"], "evidence must be correct or published"),
        (["model.variance=full"], "variance must be diagonal, kronecker or tangent"),
        (["model.probabilities=mc"], "probabilities must be mean, probit, mc-independent or mc-joint"),
        (["model.evidence=published", "model.prior=exact"], "published evidence is defined for the damped prior only"),
        (["model.n=0"], "n must be a number above 0, not 0"),
        (["model.candidates=1"], "candidates must be a whole number, 2 or more, not 1"),
    ],
)
def test_invalid_options_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make_adaptor(load_config("shapes", "bayesvlm", settings=settings), 8)


def test_factors_of_a_zero_map_are_refused():
    pairs = drawn()
    pairs.projection = {f"{side}_weight": np.zeros((16, width)) for side, width in (("image", 30), ("text", 20))}
    with pytest.raises(UserError, match=r"the image factors of drawn: n and .* must be above 0"):
        prepared(pairs)


def test_trace_against_candidates_and_batches(place, capsys):
    """The file that report.py plots, against the B factors that `prepare` gathers from the same pairs."""
    factor_trace.main(
        ["--dataset", "shapes", "--device", "cpu", *["--candidates", "300", "50", "--batches", "3", "--trials", "2"]]
    )
    printed = capsys.readouterr().out
    result = json.loads((place / "results/shapes/shapes-tiny/factor-trace.json").read_text())
    pairs = Pairs("shapes", "shapes-tiny", "train")
    assert result["items"] == 300 and result["fingerprint"] == pairs.meta["fingerprint"]
    expected = {"image": [], "text": []}
    for trial in range(2):
        torch.manual_seed(trial)
        adaptor = BayesVLM(pairs.dim, candidates=300, batches=1)
        batches = [adaptor._gather_factors(pairs, quiet=True)[0] for _ in range(3)]
        for side, values in expected.items():
            # tr B sqrt(N) is the sum over N items
            values.append([batch[side].b.trace().item() / batch[side].count ** 0.5 for batch in batches])
    for side, values in expected.items():
        points = {(point["candidates"], point["batches"]): point["relative_trace"] for point in result["sides"][side]}
        assert sorted(points) == [(size, count) for size in (50, 300) for count in (1, 2, 3)]
        whole = np.mean(values)
        for count in (1, 2, 3):
            np.testing.assert_allclose(points[300, count], np.mean(np.array(values)[:, :count], axis=1) / whole, 1e-5)
        assert np.mean(points[300, 3]) == pytest.approx(1)
        assert np.mean(points[50, 3]) < 0.9  # fewer candidates are easier to tell apart
    assert "text   K =    300  batches 3  1.000" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--candidates 1", "--candidates must be from 2 to 300, the images of"),
        ("--candidates 301", "--candidates must be from 2 to 300"),
        ("--batches 0", "--batches and --trials must be 1 or more, not 0 and 5"),
        ("--trials 0", "--batches and --trials must be 1 or more, not 5 and 0"),
    ],
)
def test_traces_with_impossible_sizes_are_refused(place, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        factor_trace.main(["--dataset", "shapes", "--device", "cpu", *flags.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (place / "results").exists()


@pytest.mark.parametrize("score", ["log_likelihood", "similarity"])
def test_a_gallery_of_pooled_features_is_searched(place, score, capsys):
    """The best answer to a caption is that of all scores, for whose gallery embeddings are computed from features."""
    train.main(TRAIN)
    for task in ("conformal", "unanswerable"):
        evaluation.main([*RUN, "--quiet", "--split", "val", "--task", task, "--score", score])
    pairs = Pairs("shapes", "shapes-tiny", "val", pooled=True)
    capsys.readouterr()
    uncertainty.main([*RUN, "--gallery", "val", "--json", pairs.items["text"][3]])
    best = json.loads(capsys.readouterr().out)[0]["best"][0]
    adaptor = Run(load_config("shapes", "bayesvlm")).load(torch.device("cpu"))[0]
    with torch.inference_mode():
        image, text = (torch.as_tensor(np.array(pairs.fed(side, True)[:])).float() for side in ("image", "text"))
        scores = getattr(adaptor, score)(adaptor.adapt_image(image), adaptor.adapt_text(text[3:4]))[:, 0]
    assert best["answer"] == pairs.items["image"][int(scores.argmax())]
    assert best["score"] == pytest.approx(float(scores.max()), abs=1e-3)
