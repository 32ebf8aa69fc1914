"""Densities against slow loops and scikit-learn; what they keep of a bank, and that nothing else reaches them."""

import math

import numpy as np
import pytest
import torch
from check_method import Drawn
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KernelDensity, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cache_embeddings
import eval as evaluation
import train
from datasets.bank import draw
from datasets.embeddings import hold_out
from models import density
from models.density import KDE, KNN, SIDES, Density, Typicality
from models.vmf_mixture import VMFMixture
from utils.checkpoint import Run
from utils.config import load_config
from utils.errors import UserError

SIZES = pytest.mark.parametrize("dim", [512, 768])
METHODS = {"knn": KNN, "kde": KDE, "typicality": Typicality, "density": Density, "vmf-mixture": VMFMixture}
EVERY = pytest.mark.parametrize("method", METHODS)


def world(dim, images=60, captions=1, seed=0):
    """Random pairs in float16, whose captions lie near their image, some nearer than others."""
    rng = np.random.default_rng(seed)
    image = 1 + rng.standard_normal((images, dim))
    noise = rng.uniform(0.5, 20, (captions * images, 1)) * rng.standard_normal((captions * images, dim))
    text = 3 * (np.tile(image, (captions, 1)) + noise)
    return Drawn(*(rows.astype(np.float16) for rows in (image, text)))


def prepared(method, pairs, rows=None, seed=0):
    """The method in float64, prepared with captions `rows` of the pairs; and the bank."""
    bank = draw(pairs, range(len(pairs.text)) if rows is None else rows, seed=0)
    torch.manual_seed(seed)
    adaptor = METHODS[method](pairs.image.shape[1])
    assert adaptor.prepare(pairs, bank, quiet=True) == bank.seen
    return adaptor.double().eval(), bank


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def uncertainties(adaptor, pairs):
    """Of all images and captions of the pairs: {modality: (N,)}."""
    rows = {side: torch.from_numpy(getattr(pairs, side)).double() for side in SIDES}
    return {side: getattr(adaptor, f"adapt_{side}")(rows[side]).uncertainty.numpy() for side in SIDES}


def each(adaptor, bank, queries):
    """For either modality: ours, and unit vectors of the queries, of its bank and of the other bank."""
    for side, ours in uncertainties(adaptor, queries).items():
        yield ours, *(unit(x) for x in (getattr(queries, side), getattr(bank, side), getattr(bank, SIDES[side])))


def slow_nearest(query, bank, k=8):
    cosines = sorted((float(np.dot(query, item)) for item in bank), reverse=True)
    return sum(cosines[:k]) / len(cosines[:k])


def slow_kernel(query, bank, beta=20.0):
    terms = [math.exp(beta * np.dot(query, item)) for item in bank]
    return math.log(sum(terms) / len(terms))


@SIZES
def test_knn(dim):
    adaptor, bank = prepared("knn", world(dim))
    for ours, query, same, _ in each(adaptor, bank, world(dim, images=5, captions=2, seed=1)):
        np.testing.assert_allclose(ours, [slow_nearest(q, same) for q in query], atol=1e-12)
        distances, _ = NearestNeighbors(n_neighbors=8, metric="cosine").fit(same).kneighbors(query)
        np.testing.assert_allclose(ours, 1 - distances.mean(axis=1), atol=1e-12)


def test_a_bank_of_fewer_items_than_k():
    adaptor, bank = prepared("knn", world(512, images=5))
    for ours, query, same, _ in each(adaptor, bank, world(512, images=7, seed=1)):
        np.testing.assert_allclose(ours, (query @ same.T).mean(axis=1), atol=1e-12)


@SIZES
def test_kde(dim):
    adaptor, bank = prepared("kde", world(dim))
    for ours, query, _, other in each(adaptor, bank, world(dim, images=5, captions=2, seed=1)):
        np.testing.assert_allclose(ours, [slow_kernel(q, other) for q in query], atol=1e-10)
        # Of unit vectors |q - b|^2 = 2 - 2 cosine; what remains is the normalizer of a Gaussian.
        gaussian = KernelDensity(bandwidth=20**-0.5, rtol=0).fit(other).score_samples(query)
        np.testing.assert_allclose(ours, gaussian + 20 + dim / 2 * math.log(2 * math.pi / 20), rtol=1e-10)


def ledoit_wolf(rows):
    """The covariance of Ledoit and Wolf (2004), item by item."""
    centered = rows - rows.mean(axis=0)
    count, dim = rows.shape
    sample = sum(np.outer(x, x) for x in centered) / count
    target = np.trace(sample) / dim * np.eye(dim)
    distance = ((sample - target) ** 2).sum()
    error = sum(((np.outer(x, x) - sample) ** 2).sum() for x in centered) / count**2
    share = min(error, distance) / distance
    assert 0.01 < share < 0.99  # or the test would not see the shrinkage
    return (1 - share) * sample + share * target


@SIZES
def test_typicality(dim):
    adaptor, bank = prepared("typicality", world(dim))
    for ours, query, same, _ in each(adaptor, bank, world(dim, images=5, captions=2, seed=1)):
        for covariance in (LedoitWolf().fit(same).covariance_, ledoit_wolf(same)):
            inverse = np.linalg.inv(covariance)
            theirs = [-mahalanobis(q, same.mean(axis=0), inverse) for q in query]
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # the state is float32


def slow_gallery(bank, inside):
    """Features and labels of the queries among the images `inside`, one by one: {modality: ([...], [...])}."""
    owner = bank.image_of_text.tolist()
    banks = {"image": unit(bank.image), "text": unit(bank.text)}
    rows = {"image": inside, "text": [j for j in range(len(owner)) if owner[j] in inside]}
    image_of = {"image": list(range(len(bank.image))), "text": owner}
    examples = {}
    for side, other in SIDES.items():
        rest = {name: np.delete(banks[name], rows[name], axis=0) for name in SIDES}
        center = rest[side].mean(axis=0)
        features, wrong = [], []
        for row in rows[side]:
            query = banks[side][row]
            answer = max(rows[other], key=lambda item: query @ banks[other][item])
            wrong.append(image_of[other][answer] != image_of[side][row])
            to_center = query @ center / np.linalg.norm(center)
            features.append([slow_nearest(query, rest[side]), slow_kernel(query, rest[other]), to_center])
        examples[side] = features, wrong
    return examples


@SIZES
@pytest.mark.parametrize("captions", [1, 3])
def test_density(dim, captions):
    """The regression is scikit-learn's, on galleries that a loop answers query by query."""
    pairs = world(dim, images=40, captions=captions)
    adaptor, bank = prepared("density", pairs, seed=3)
    torch.manual_seed(3)
    adaptor_draws = [torch.randperm(40) for _ in range(6)]
    galleries = [slow_gallery(bank, [i for i in range(40) if order[i] < 10]) for order in adaptor_draws]
    queries = world(dim, images=5, captions=captions, seed=1)
    ours = uncertainties(adaptor, queries)
    for side, other in SIDES.items():
        features, wrong = (np.concatenate([gallery[side][i] for gallery in galleries]) for i in (0, 1))
        assert 0.05 < np.mean(wrong) < 0.95
        regression = LogisticRegression(C=1 / 20, tol=1e-10, max_iter=10_000)
        fit = make_pipeline(StandardScaler(), regression).fit(features, wrong)
        same, rest = unit(getattr(bank, side)), unit(getattr(bank, other))
        center = same.mean(axis=0) / np.linalg.norm(same.mean(axis=0))
        query = unit(getattr(queries, side))
        asked = [[slow_nearest(q, same), slow_kernel(q, rest), q @ center] for q in query]
        np.testing.assert_allclose(ours[side], fit.predict_proba(asked)[:, 1], atol=1e-4)
        assert np.ptp(ours[side]) > 0.01


def test_density_where_every_answer_is_right():
    """Then no query is less certain than another, and the probability is that of no error in so many answers."""
    rows = np.eye(40, dtype=np.float16)
    adaptor, _ = prepared("density", Drawn(rows, rows))
    for values in uncertainties(adaptor, Drawn(rows[:3], rows[:3])).values():
        np.testing.assert_allclose(values, 0.5 / (6 * 10 + 1), rtol=1e-5)


def test_too_few_images_for_galleries():
    with pytest.raises(UserError, match="its 3 training images into galleries and the rest: give it at least 4"):
        prepared("density", world(8, images=3))


@EVERY
def test_zeros_and_equal_vectors_stay_finite(method):
    zeros, ones = np.zeros((6, 512), np.float16), np.ones((6, 512), np.float16)
    for rows in (zeros, ones, np.concatenate([zeros, ones])):
        adaptor, _ = prepared(method, Drawn(rows, rows))
        for queries in (Drawn(zeros, ones), world(512, images=6)):
            for values in uncertainties(adaptor, queries).values():
                assert np.isfinite(values).all()


def test_blocks_change_nothing(monkeypatch):
    pairs, queries = world(512), world(512, images=9, captions=2, seed=1)
    for method in ("knn", "kde", "density"):
        adaptor, _ = prepared(method, pairs)
        whole = uncertainties(adaptor, queries)
        with monkeypatch.context() as patch:
            patch.setattr(density, "TILE", 4 * len(pairs.text))
            for side, values in uncertainties(adaptor, queries).items():
                np.testing.assert_allclose(values, whole[side], rtol=1e-12)


def test_a_block_of_a_large_bank_is_small():
    """At COCO's size, 25,014 queries and a bank of 10,000, no more than 16 MB of cosines are in memory at once."""
    sizes = []
    query, bank = torch.randn(25_014, 2), torch.randn(10_000, 2)
    result = density.by_blocks(lambda cosines: sizes.append(cosines.shape) or cosines[:, 0], query, bank)
    assert len(result) == sum(rows for rows, _ in sizes) == 25_014
    assert all(4 * rows * columns <= 2**24 for rows, columns in sizes)


@EVERY
def test_only_the_bank_is_learned_from(method):
    """Noise in place of the pairs that are held out changes nothing, and noise in place of one of the bank does."""
    pairs = world(512, captions=2)
    rows, blocks = hold_out(pairs.image_of_text, 0.2, seed=0)
    out = torch.cat(blocks).numpy()
    state = prepared(method, pairs, rows)[0].state_dict()
    for side in SIDES:
        bank = state.get(f"{side}_bank")
        if bank is not None:
            hidden = out if side == "text" else np.unique(pairs.image_of_text[out])
            matrix = torch.from_numpy(getattr(pairs, side)[hidden]).double()
            assert len(bank) == len(getattr(pairs, side)) - len(hidden)
            assert not (bank[:, None] == matrix).all(dim=-1).any()
    rng = np.random.default_rng(1)
    pairs.text[out] = rng.standard_normal((len(out), 512))
    pairs.image[np.unique(pairs.image_of_text[out])] = 5.0
    for name, value in prepared(method, pairs, rows)[0].state_dict().items():
        assert torch.equal(value, state[name]), name
    pairs.text[rows[:1]] = -pairs.text[rows[:1]]
    changed = prepared(method, pairs, rows)[0].state_dict()
    assert any(not torch.equal(value, state[name]) for name, value in changed.items())


def write_pairs(path, replaced):
    """Write 40 pairs as an .npz; the images `replaced`, and their captions, are noise."""
    pairs = world(64, images=40, captions=2)
    rng = np.random.default_rng(7)
    for side, images in (("image", np.arange(40)), ("text", pairs.image_of_text)):
        rows = np.isin(images, replaced)
        getattr(pairs, side)[rows] = rng.standard_normal((rows.sum(), 64))
    np.savez(path, image=pairs.image, text=pairs.text, image_of_text=pairs.image_of_text)


@EVERY
def test_the_evaluated_split_reaches_no_state(method, tmp_path, monkeypatch, refusal):
    """The scripts train the same state when the evaluated split is noise, and refuse to evaluate on the bank."""
    states = []
    evaluated = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        write_pairs("pairs.npz", evaluated)
        flags = ["--dataset", "embeddings", "--root", "pairs.npz", "--splits", "train0", "test0", "--quiet"]
        cache_embeddings.main(flags)
        run = ["--dataset", "embeddings", "--method", method, "--device", "cpu", "--quiet"]
        train.main([*run, "--val-fraction", "0"])  # it has then seen nothing but the bank
        evaluated = np.load("embeddings/embeddings/given/test0/image_id.npy")
        saved = Run(load_config("embeddings", method))
        adaptor, *_ = saved.load("cpu")
        states.append(adaptor.state_dict())
        evaluation.main(run)
        assert "was trained on 32 of the 32 images" in refusal(evaluation.main, *run, "--split", "train0")
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_bank_is_written_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("pairs.npz", **{side: rng.standard_normal((1000, 512)).astype(np.float16) for side in SIDES})
    cache_embeddings.main(["--dataset", "embeddings", "--root", "pairs.npz", "--splits", "train0", "--quiet"])
    train.main(["--dataset", "embeddings", "--method", "knn", "--device", "cpu", "--quiet"])
    run = Run(load_config("embeddings", "knn"))
    adaptor, *_ = run.load("cpu")
    assert adaptor.text_bank.shape == (800, 512) and adaptor.text_bank.dtype == torch.float16
    assert run.adaptor_file.stat().st_size < 1.1 * 2 * 800 * 512 * 2


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (KNN, {"k": 0}, "k must be a whole number above 0, not 0"),
        (KNN, {"k": 2.5}, "k must be a whole number above 0, not 2.5"),
        (KDE, {"beta": -1.0}, "beta must be a number above 0, not -1.0"),
        (KDE, {"beta": math.nan}, "beta must be a number above 0, not nan"),
        (Density, {"penalty": "20"}, "penalty must be a number above 0, not '20'"),
        (Density, {"galleries": True}, "galleries must be a whole number above 0, not True"),
    ],
)
def test_impossible_options(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(8, **options)


def test_real_captions_and_images_of_coco(shared):
    """On five disjoint fifths of 500 pairs by CLIP ViT-B/16, the AUROC of wrong answers; larger = less certain."""
    with np.load(shared / "data" / "coco500_vitb16.npz") as file:
        image, text = file["image"], file["text"]
    order = np.random.default_rng(0).permutation(len(image))
    scores = {(method, side): [] for method in METHODS for side in SIDES}
    for part in np.array_split(order, 5):
        rest = np.setdiff1d(order, part)
        queries, cosines = Drawn(image[part], text[part]), unit(image[part]) @ unit(text[part]).T
        wrong = {side: cosines.argmax(axis=int(side == "image")) != np.arange(len(part)) for side in SIDES}
        for method in METHODS:
            pairs = Drawn(*(rows[rest].astype(np.float16) for rows in (image, text)))
            for side, values in uncertainties(prepared(method, pairs)[0], queries).items():
                scores[method, side].append(roc_auc_score(wrong[side], values))
    least = {"knn": (0.65, 0.72), "kde": (0.6, 0.6), "typicality": (0.64, 0.68), "density": (0.65, 0.71)}
    least["vmf-mixture"] = (0.65, 0.65)
    for (method, side), values in scores.items():
        assert np.mean(values) >= least[method][side == "text"], (method, side, np.mean(values))
