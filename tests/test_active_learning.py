"""active_learning.py at tiny sizes: every number of a result against a slow reimplementation, and its errors."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import forked
from scipy import stats

import active_learning
import labeling
from datasets.embeddings import LAYOUT
from labeling import strategies
from labeling.classifier import Classifier, Items, fine_tune
from labeling.strategies import STRATEGIES, Choice
from models.laplace import Factors, Posterior
from reporting.curves import curves_text
from utils.errors import UserError

D, P, C = 6, 8, 3
SIZES = {"train": 30, "shifted-train": 20, "shifted-val": 12, "shifted-test": 40}
SCALE = 12.0
FLAGS = [
    "--dataset", "shapes-colors", "--pool", "train", "shifted-train", "--target", "shifted-test", "--device", "cpu",
    "--budgets", "3", "8", "--similarity", "cosine", "--draws", "12", "--epig-pool", "9", "--epig-targets", "4",
    "--epochs", "12", "--batch-size", "5", "--lr", "0.1", "--patience", "4",
]  # fmt: skip
VAL = ["--val", "shifted-val"]
FOLDER = Path("results/shapes-colors/shapes-tiny/active/shifted-test")


def write_cache(split, seed, features="pooled", labels=True, classes=("red", "green", "blue"), base=0, logit_bias=None):
    """Write a cache of random features in the layout of cache_embeddings.py, with two prompts per class."""
    rng, world = np.random.default_rng(seed), np.random.default_rng(0)
    weight, bias, centers = world.normal(size=(D, P)), world.normal(size=D), world.normal(size=(C, P))
    label = rng.integers(0, C, SIZES[split])
    phi = centers[label] + 0.9 * rng.normal(size=(len(label), P)) + (0.8 if "shifted" in split else 0)
    text = (centers @ weight.T + bias)[np.repeat(np.arange(C), 2)] + rng.normal(size=(2 * C, D))
    if split != "train":
        text = np.load("embeddings/shapes-colors/shapes-tiny/train/text.npy")
    arrays = {
        "image": phi @ weight.T + bias, "text": text, "image_pooled": phi, "text_pooled": text,
        "image_id": np.arange(len(label)) + base, "text_id": np.arange(2 * C), "label": label,
        "class_of_text": np.repeat(np.arange(C), 2),
    }  # fmt: skip
    folder = Path("embeddings/shapes-colors/shapes-tiny", split)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.astype(np.float16) if array.dtype == float else array)
    np.savez(folder / "projection.npz", image_weight=weight, image_bias=bias, text_weight=np.eye(D))
    meta = {
        "layout": LAYOUT, "dataset": "shapes-colors", "split": split, "backbone": "shapes-tiny", "features": features,
        "id_space": "drawn" if base else split, "encoder": {}, "encoder_fingerprint": "e",
        "precision": "float32", "skipped": 0, "captions_cut": 0, "unreadable": 0,
        "fingerprint": f"{split}-{seed}", "dim": D, "images": len(label), "captions": 2 * C,
        "logit_scale": SCALE, "logit_bias": logit_bias, "complete": True,
        "files": [*(f"{name}.npy" for name in arrays), "projection.npz", "items.jsonl"],
    }  # fmt: skip
    if labels:
        meta["classes"] = list(classes)
    else:
        np.save(folder / "image_of_text.npy", np.zeros(2 * C, np.int64))
        meta["files"].append("image_of_text.npy")
    names = {"image": meta["images"], "text": meta["captions"]}
    lines = [json.dumps({"kind": kind, "value": "x"}) for kind, count in names.items() for _ in range(count)]
    (folder / "items.jsonl").write_text("\n".join(lines))
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, split in enumerate(SIZES):
        write_cache(split, seed)
    return tmp_path


def run(*flags, argv=FLAGS):
    active_learning.main([*argv, "--quiet", *flags])


def result(strategy, seed=0, folder=FOLDER):
    path = folder / f"{strategy}-seed{seed}.json"
    with np.load(path.with_suffix(".npz")) as arrays:
        return json.loads(path.read_text()), dict(arrays)


# A slow reimplementation in float64.


def read(split):
    folder = Path("embeddings/shapes-colors/shapes-tiny", split)
    part = {
        name: np.load(folder / f"{name}.npy") for name in ("image", "text", "image_pooled", "label", "class_of_text")
    }
    phi = np.hstack([part["image_pooled"].astype(float), np.ones((len(part["label"]), 1))])
    return part["image"].astype(float), phi, part["label"], part["text"].astype(float), part["class_of_text"]


def data(split):
    return read(split)[:3]


def class_means():
    *_, text, owner = read("shifted-test")
    means = []
    for number in range(C):
        units = [row / np.linalg.norm(row) for row in text[owner == number]]
        means.append(sum(units) / np.linalg.norm(sum(units)))
    return np.array(means)


def weights():
    with np.load("embeddings/shapes-colors/shapes-tiny/shifted-test/projection.npz") as archive:
        return np.hstack([archive["image_weight"], archive["image_bias"][:, None]])


def slow_logits(weight, z, phi):
    g, means = z + phi @ (weight - weights()).T, class_means()
    return np.array([[SCALE * row @ h / np.linalg.norm(row) for h in means] for row in g])


def softmax(logit):
    e = np.exp(logit - logit.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def slow_nll(weight, part):
    probability = softmax(slow_logits(weight, part[0], part[1]))
    return -np.log(probability[np.arange(len(part[2])), part[2]])


def slow_entropy(weight, part):
    return np.array([-sum(p * np.log(p) for p in row if p > 0) for row in softmax(slow_logits(weight, *part[:2]))])


def slow_fine_tune(part, val, seed, lr=0.1, decay=0.05, epochs=12, batch=5, patience=4):
    """Fine-tune by AdamW, with optimizer and gradient written out."""
    start, h, generator = weights(), class_means(), torch.Generator().manual_seed(seed)
    weight, m, v, step = start.copy(), 0.0, 0.0, 0
    best = (np.inf, 0, start)
    for epoch in range(epochs + 1):
        if epoch:
            for rows in torch.randperm(len(part[2]), generator=generator).split(batch):
                z, phi, label = (x[rows.numpy()] for x in part)
                gradient = np.zeros_like(weight)
                for row, f, target in zip(z + phi @ (weight - start).T, phi, label, strict=True):
                    x, length = row / np.linalg.norm(row), np.linalg.norm(row)
                    error = softmax(SCALE * (h @ x)[None])[0] - np.eye(C)[target]
                    along = SCALE * error @ h
                    gradient += np.outer((along - x * (x @ along)) / length, f) / len(label)
                step += 1
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                weight = weight * (1 - lr * decay)
                weight = weight - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        if val is None:
            best = (0, epoch, weight)
            continue
        loss = slow_nll(weight, val).mean()
        if loss < best[0]:
            best = (loss, epoch, weight)
        elif epoch - best[1] >= patience:
            break
    return best[2], best[1]


def slow_ece(confidence, hit, bins=15):
    total = 0.0
    for i in range(bins):
        inside = (confidence >= i / bins) & ((confidence < (i + 1) / bins) | (i == bins - 1))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    return total


def slow_auroc(uncertainty, hit):
    pairs = [(a > b) + (a == b) / 2 for a in uncertainty[hit == 0] for b in uncertainty[hit == 1]]
    return np.mean(pairs)


def assert_figures(figures, probability, label):
    hit, entropy = (probability.argmax(axis=1) == label).astype(float), -(probability * np.log(probability)).sum(axis=1)
    assert figures["accuracy"] == pytest.approx(hit.mean(), abs=1e-9)
    assert figures["nll"] == pytest.approx(-np.log(probability[np.arange(len(label)), label]).mean(), rel=1e-3)
    assert figures["ece"] == pytest.approx(slow_ece(probability.max(axis=1), hit), abs=1e-3)
    assert figures["entropy_auroc"] == pytest.approx(slow_auroc(entropy, hit), abs=1e-9)
    assert figures["probability_auroc"] == pytest.approx(slow_auroc(-probability.max(axis=1), hit), abs=1e-9)
    levels, order = figures["by_entropy"], np.argsort(entropy)
    assert levels["count"] == [4] * 10
    assert levels["entropy"] == pytest.approx([entropy[order[4 * i : 4 * i + 4]].mean() for i in range(10)], abs=1e-3)
    assert levels["error"] == pytest.approx([1 - hit[order[4 * i : 4 * i + 4]].mean() for i in range(10)], abs=1e-9)


def pool_of(seed):
    """Rows of the pool that a seed offers, and the generator after that draw."""
    generator = torch.Generator().manual_seed(seed)
    offer = torch.randperm(50, generator=generator)[:25].sort().values.numpy()
    return offer, generator


def slow_density(part):
    """Settles & Craven's mean similarity to all items of a part, by von Mises-Fisher kernels, in loops."""
    unit = [row / np.linalg.norm(row) for row in part[0]]
    return np.array([np.mean([np.exp(20 * (row @ other - 1)) for other in unit]) for row in unit])


def slow_order(strategy, offer, generator):
    """The rows of the offer that a strategy chooses, by loops."""
    pool = tuple(np.concatenate(pair)[offer] for pair in zip(data("train"), data("shifted-train"), strict=True))
    target, weight = data("shifted-test"), weights()
    shuffled = torch.randperm(25 if strategy == "random" else 40, generator=generator).tolist()
    if strategy == "random":
        return shuffled[:8]
    if strategy in ("entropy", "entropy-density"):
        score = slow_entropy(weight, pool) * (slow_density(pool) if "density" in strategy else 1)
        return np.argsort(-score, kind="stable")[:8].tolist()
    if strategy == "k-center":
        unit = [row / np.linalg.norm(row) for row in pool[0]]
        chosen = [int(np.argmin([np.linalg.norm(row - np.mean(unit, axis=0)) for row in unit]))]
        while len(chosen) < 8:
            chosen.append(int(np.argmax([min(np.linalg.norm(row - unit[i]) for i in chosen) for row in unit])))
        return chosen
    score = slow_entropy(weight, target) * (slow_density(target) if "density" in strategy else 1)
    order = shuffled if strategy == "random-targeted" else np.argsort(-score, kind="stable")
    return nearest_first(pool, target, order)


def slow_curvature(row, h):
    """Gauss-Newton matrix (D, D) of the cross-entropy of one embedding against unit classes (C, D)."""
    x, length = row / np.linalg.norm(row), np.linalg.norm(row)
    p = softmax(SCALE * (h @ x)[None])[0]
    turn = (np.eye(D) - np.outer(x, x)) / length
    return SCALE**2 * turn @ h.T @ (np.diag(p) - np.outer(p, p)) @ h @ turn


def spreads(part):
    """Total variance of each embedding under the pool's damped posterior, by dense linear algebra."""
    z, phi, _ = (np.concatenate(pair) for pair in zip(data("train"), data("shifted-train"), strict=True))
    h = class_means()
    a, b, n = phi.T @ phi / np.sqrt(50), sum(slow_curvature(row, h) for row in z) / np.sqrt(50), 10.0
    precision = json.loads((FOLDER / "random-seed0.json").read_text())["prior_precision"]
    left = np.linalg.inv(np.sqrt(n) * b + np.sqrt(precision) * np.eye(D))
    right = np.linalg.inv(np.sqrt(n) * a + np.sqrt(precision) * np.eye(P + 1))
    slope = []
    for value in (precision * 0.99, precision * 1.01):  # around the maximum of the evidence
        evidence = 0.5 * D * (P + 1) * np.log(value) - 0.5 * value * np.square(weights()).sum()
        evidence -= 0.5 * D * np.linalg.slogdet(np.sqrt(n) * a + np.sqrt(value) * np.eye(P + 1))[1]
        slope.append(evidence - 0.5 * (P + 1) * np.linalg.slogdet(np.sqrt(n) * b + np.sqrt(value) * np.eye(D))[1])
    assert abs(slope[1] - slope[0]) < 1e-2 * D * (P + 1) * 0.02
    return np.array([np.trace(left) * (f @ right @ f) for f in part[1]])


def nearest_first(pool, target, order):
    expected = [np.sqrt((part[0] ** 2).sum(axis=1) + spreads(part)) for part in (pool, target)]
    rows = []
    near = (target[0] @ pool[0].T) / np.outer(expected[1], expected[0])
    for rank in range(25):
        for row in order:
            best = int(np.argsort(-near[row])[rank])
            if best not in rows:
                rows.append(best)
    return rows[:8]


@pytest.mark.parametrize("counted", [False, True])
def test_every_number_matches_the_slow_reimplementation(caches, counted):
    checked = ["random", "random-targeted", "entropy", "entropy-targeted", "k-center"]
    run(*VAL, *(["--val-counts"] if counted else []), "--seeds", "0", "3", "--strategies", *checked)
    test, val = data("shifted-test"), data("shifted-val")
    whole = tuple(np.concatenate(pair) for pair in zip(data("train"), data("shifted-train"), strict=True))
    epochs = []
    for seed in (0, 3):
        for strategy in checked:
            values, arrays = result(strategy, seed)
            assert_figures(values["before"], softmax(slow_logits(weights(), *test[:2])), test[2])
            offer, generator = pool_of(seed)
            held_out = torch.randperm(12, generator=generator).numpy()
            picks = 6 if counted else 8
            order = offer[slow_order(strategy, offer, generator)][:picks]
            splits = np.repeat(["train", "shifted-train"], [30, 20])[order]
            assert values["chosen_split"] == splits.tolist()
            assert values["chosen_id"] == [row if row < 30 else row - 30 for row in order]
            for i, (point, budget) in enumerate(zip(values["curve"], (3, 8), strict=True)):
                spent = {3: 1, 8: 2}[budget] if counted else 0
                assert (point["budget"], point["labels"]) == (budget, budget - spent)
                assert point["val_labels"] == (spent or 12)
                validation = tuple(part[held_out[:spent]] for part in val) if counted else val
                labeled = tuple(part[order[: budget - spent]] for part in whole)
                weight, epoch = slow_fine_tune(labeled, validation, seed)
                assert point["epoch"] == epoch
                epochs.append(epoch)
                probability = softmax(slow_logits(weight, *test[:2]))
                assert_figures(point, probability, test[2])
                assert np.allclose(arrays["nll"][i], slow_nll(weight, test), rtol=1e-3, atol=1e-3)
                assert np.allclose(arrays["confidence"][i], probability.max(axis=1), atol=1e-3)
                assert (arrays["hit"][i] == (probability.argmax(axis=1) == test[2])).all()
                assert np.allclose(arrays["entropy"][i], slow_entropy(weight, test), atol=1e-3)
            assert np.allclose(arrays["before_entropy"], slow_entropy(weights(), test), atol=1e-3)
    assert len(set(epochs)) > 3 and max(epochs) > 0


def test_without_val_the_last_epoch_is_kept(caches):
    run("--strategies", "random", "--seeds", "1")
    values, _ = result("random", 1)
    offer, generator = pool_of(1)
    torch.randperm(0, generator=generator)
    order = offer[slow_order("random", offer, generator)]
    whole = tuple(np.concatenate(pair)[order] for pair in zip(data("train"), data("shifted-train"), strict=True))
    weight, epoch = slow_fine_tune(whole, None, 1)
    assert values["curve"][1]["epoch"] == epoch == 12 and values["curve"][1]["val_labels"] == 0
    assert values["curve"][1]["nll"] == pytest.approx(slow_nll(weight, data("shifted-test")).mean(), rel=1e-3)


def slow_information(pool, target):
    """Mutual information of each item's label and a random target's, from the joint table of every pair."""
    information = np.zeros(pool.shape[1])
    for i in range(pool.shape[1]):
        for t in range(target.shape[1]):
            joint = np.mean([np.outer(pool[k, i], target[k, t]) for k in range(len(pool))], axis=0)
            outer = np.outer(joint.sum(axis=1), joint.sum(axis=0))
            information[i] += (joint * np.log(joint / outer)).sum() / target.shape[1]
    return information


@pytest.mark.parametrize("reference", [False, True])
def test_epig_picks_the_best_score_and_updates_the_posterior(caches, monkeypatch, reference):
    scored, posteriors, candidates = [], [], []
    epig, probabilities, select = strategies.epig, strategies.probabilities, strategies.select

    def spied_epig(pool, target, corrected=True):
        score = epig(pool, target, corrected)
        scored.append((pool.double().numpy(), target.double().numpy(), corrected, score))
        return score

    def spied_probabilities(choice, posterior, *parts):
        posteriors.append(posterior)
        return probabilities(choice, posterior, *parts)

    def spied_select(score, budget):
        candidates.append(len(score))
        return select(score, budget)

    monkeypatch.setattr(strategies, "epig", spied_epig)
    monkeypatch.setattr(strategies, "probabilities", spied_probabilities)
    monkeypatch.setattr(strategies, "select", spied_select)
    preset = ["--preset", "reference"] if reference else []
    run(*VAL, "--strategies", "epig", "--seeds", "0", *preset)
    folder = FOLDER.with_name("shifted-test+reference") if reference else FOLDER
    values, _ = result("epig", folder=folder)
    assert candidates == list(range(9, 1, -1)) and len(set(zip(values["chosen_split"], values["chosen_id"]))) == 8
    for pool, target, corrected, score in scored:
        assert pool.shape[0] == 12 and target.shape == (12, 4, C) and corrected is not reference
        bias = 0 if reference else slow_information(pool, np.roll(target, 6, axis=0))
        assert np.allclose(score, slow_information(pool, target) - bias, atol=2e-5)
    # The posterior of each score: the factors of the whole pool, and each earlier pick counted ten times.
    pool, h = {split: data(split)[:2] for split in ("train", "shifted-train")}, class_means()
    z, phi = (np.concatenate(pair) for pair in zip(*pool.values(), strict=True))
    a, b = phi.T @ phi, sum(slow_curvature(row, h) for row in z)
    start, count, precisions = b, 50, set()
    for posterior, split, row in zip(posteriors, values["chosen_split"], values["chosen_id"], strict=True):
        factors = posterior.spectrum.factors
        assert factors.count == count
        for factor, expected in ((factors.a, a), (factors.b, b)):
            assert np.linalg.norm(factor.numpy() * np.sqrt(count) - expected) < 1e-4 * np.linalg.norm(expected)
        again = Posterior(factors, np.square(weights()).sum(), 10.0)
        assert posterior.precision == pytest.approx(again.precision, rel=1e-4) and posterior.n == 10
        precisions.add(posterior.precision)
        picked, one = (part[row] for part in pool[split])
        a = a + 10 * ((one @ one) * np.ones_like(a) if reference else np.outer(one, one))
        b, count = b + 10 * slow_curvature(picked, h), count + (1 if reference else 10)
    assert np.linalg.norm(b) > 1.5 * np.linalg.norm(start) and len(precisions) == 8


def test_preset_published_is_another_name_of_reference(caches, capsys):
    run("--strategies", "random", "--seeds", "0", "--preset", "published")
    new, old = (FOLDER.with_name(f"shifted-test+{preset}") for preset in ("reference", "published"))
    renamed = f"--preset published is called reference now, as in train.py: results go to {new}"
    assert capsys.readouterr().err == f"{renamed}.\n"
    values, _ = result("random", folder=FOLDER.with_name("shifted-test+reference"))
    assert values["settings"]["preset"] == "reference" and not FOLDER.with_name("shifted-test+published").exists()
    made = {path: Path(path).stat().st_mtime_ns for path in contents()}
    run("--strategies", "random", "--seeds", "0", "--preset", "reference")
    assert {path: Path(path).stat().st_mtime_ns for path in contents()} == made
    assert capsys.readouterr().err == ""
    old.mkdir()
    run("--strategies", "random", "--seeds", "0", "--preset", "published")
    assert capsys.readouterr().err == f"{renamed}, those in {old} stay as they are.\n"
    assert {path: Path(path).stat().st_mtime_ns for path in contents()} == made


def test_scores_that_are_not_finite_end_with_the_way_out(caches, refusal):
    """Training that diverges needs a lower rate; what is not finite before training lies in the cache."""
    call = [active_learning.main, *FLAGS, "--strategies", "random", "--seeds", "0", "--quiet"]
    message = refusal(*call, "--lr", "1e37")
    assert message.endswith("random, seed 0: a score is not finite on the target; try --lr with less.\n")
    text = Path("embeddings/shapes-colors/shapes-tiny/shifted-test/text.npy")
    np.save(text, np.full_like(np.load(text), np.nan))
    assert "shifted-test before training: cache it again." in refusal(*call)


def test_a_loss_on_val_that_is_never_finite_is_named():
    labeled = Items(torch.randn(4, D), torch.randn(4, P), torch.tensor([0, 1, 2, 0]))
    val = labeled._replace(embedding=torch.full((4, D), torch.nan))
    options = SimpleNamespace(lr=0.1, weight_decay=0.0, epochs=2, batch_size=2, patience=2)
    with pytest.raises(UserError, match=r"^no epoch gives the images of --val a finite loss: .* infinity\.$"):
        fine_tune(Classifier(torch.randn(D, P), torch.randn(C, D), SCALE), labeled, val, options, 0)


def share_near_target(reference, seed=0):
    """Share of EPIG's picks in the target's region: half of the pool shares the target's 10 inputs of 20, half none."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.zeros(80, 20)
    phi[:40, :10], phi[40:, 10:] = torch.randn(2, 40, 10, generator=generator)
    target = torch.zeros(60, 20)
    target[:, :10] = torch.randn(60, 10, generator=generator)
    weight, classes = torch.randn(8, 20, generator=generator), torch.randn(4, 8, generator=generator)
    pool, target = (Items(f @ weight.T, f, torch.zeros(len(f), dtype=torch.long)) for f in (phi, target))
    posterior = Posterior(Factors(torch.eye(20), torch.eye(8), 1000), 1.0, 1.0, precision=0.2)
    loss = {"loss": "infonce", "bias": 0.0}
    choice = Choice(pool, target, Classifier(weight, classes, 5.0), posterior, loss, 20, generator, draws=400,
                    reference=reference, candidates=80, targets=60, weight=1)  # fmt: skip
    return (STRATEGIES["epig"](choice) < 40).float().mean().item()


def test_epig_finds_the_target_region_and_the_reference_preset_does_not():
    assert share_near_target(reference=False) >= 0.9
    assert 0.25 <= np.mean([share_near_target(reference=True, seed=seed) for seed in range(2)]) <= 0.75


@pytest.mark.parametrize("reference", [False, True])
def test_draws_of_two_parts_share_one_map_unless_reference(reference):
    torch.manual_seed(0)
    weight, classes, phi = torch.randn(D, P), torch.randn(C, D), torch.randn(2, P)
    items = Items(phi @ weight.T, phi, torch.zeros(2, dtype=torch.long))
    # Draws follow the updated posterior that is passed, not the initial one of the Choice.
    posterior, start = (Posterior(Factors(torch.eye(P), torch.eye(D), 10), 1.0, 1.0, precision=p) for p in (30.0, 5.0))
    choice = Choice(items, items, Classifier(weight, classes, 3.0), start, {}, 1, torch.Generator().manual_seed(1),
                    draws=4000, reference=reference)  # fmt: skip
    one, two = (part.log() for part in strategies.probabilities(choice, posterior, items, items))
    assert torch.equal(one, two) is not reference
    gap = (one[..., :1] - one[..., 1:]).double()  # of logits: all that probabilities determine
    # In closed form: coordinates of an embedding are independent, with variance v.
    v = 1 / (1 + 30**0.5) * (phi.double().square().sum(dim=1) / (1 + 30**0.5))
    unit, g = F.normalize(classes.double(), dim=1), items.embedding.double()
    if reference:
        correlation = np.corrcoef(gap[:, 0, 0], (two[..., :1] - two[..., 1:])[:, 0, 0])[0, 1]
        assert abs(correlation) < 0.06
        length = (g.square().sum(dim=1) + D * v).sqrt()  # root mean square
        mean = 3 * g @ unit.T / length[:, None]
        variance = 9 * v / length**2  # of every logit: classes have length 1
        assert torch.allclose(gap.mean(dim=0), mean[:, :1] - mean[:, 1:], atol=0.06)
        assert torch.allclose(gap.var(dim=0), 2 * variance[:, None].expand(-1, C - 1), rtol=0.1)
    else:
        x, length = F.normalize(g, dim=1), g.norm(dim=1)
        apart = unit[:1] - unit[1:]
        across = apart.square().sum(dim=1) - (x @ apart.T).square()  # to first order in the noise
        assert torch.allclose(gap.var(dim=0), (9 * v / length**2)[:, None] * across, rtol=0.1)


def test_bald_picks_neighbors_of_targets_on_which_drawn_weights_disagree(caches, monkeypatch):
    drawn, bald = [], strategies.bald

    def spied_bald(samples):
        drawn.append(samples.double().numpy())
        return bald(samples)

    monkeypatch.setattr(strategies, "bald", spied_bald)
    run(*VAL, "--strategies", "random", "bald", "--seeds", "0")  # random's file holds the precision that spreads reads
    (samples,) = drawn
    entropy = -(samples * np.log(samples)).sum(axis=2)
    mean = samples.mean(axis=0)
    order = np.argsort(entropy.mean(axis=0) + (mean * np.log(mean)).sum(axis=1), kind="stable")
    pool = tuple(np.concatenate(pair)[pool_of(0)[0]] for pair in zip(data("train"), data("shifted-train"), strict=True))
    chosen = pool_of(0)[0][nearest_first(pool, data("shifted-test"), order)]
    assert result("bald")[0]["chosen_id"] == [row if row < 30 else row - 30 for row in chosen]


def test_acquisitions_are_weighted_by_density(caches):
    weighted = ["entropy-density", "entropy-targeted-density"]
    run(*VAL, "--seeds", "0", "--strategies", "random", "entropy", "entropy-targeted", *weighted)
    for strategy in weighted:
        offer, generator = pool_of(0)
        order = offer[slow_order(strategy, offer, generator)]
        chosen = result(strategy)[0]["chosen_id"]
        assert chosen == [row if row < 30 else row - 30 for row in order]
        assert chosen != result(strategy.removesuffix("-density"))[0]["chosen_id"]


def test_help_says_what_each_strategy_says_of_itself():
    assert {name: choose.__doc__.splitlines()[0] for name, choose in STRATEGIES.items()} == labeling.STRATEGIES


@pytest.mark.parametrize("name", STRATEGIES)
def test_smaller_budgets_are_prefixes_of_larger_ones_and_no_strategy_sees_a_label(caches, name):
    run(*VAL, "--strategies", name, "--seeds", "2", "--k", "2", "--similarity", "wasserstein")
    large = result(name, 2)[0]
    for split in ("train", "shifted-train", "shifted-test"):
        path = Path("embeddings/shapes-colors/shapes-tiny", split, "label.npy")
        np.save(path, (np.load(path) + 1) % C)
    small = ["--budgets", "3", "--k", "2", "--similarity", "wasserstein", "--tag", "small"]
    # The number of EPIG's candidates depends on the largest budget only if that exceeds --epig-pool.
    run(*VAL, "--strategies", name, "--seeds", "2", *small)
    smaller = result(name, 2, FOLDER.with_name("shifted-test+small"))[0]
    assert smaller["chosen_id"] == large["chosen_id"][:3] and smaller["chosen_split"] == large["chosen_split"][:3]
    assert len(set(zip(large["chosen_split"], large["chosen_id"], strict=True))) == 8


def contents():
    return {str(path): path.read_bytes() for path in sorted(Path("results").glob("**/*.[jn]*")) if path.is_file()}


def test_a_killed_run_goes_on_to_the_same_results(caches, capsys):
    flags = [*VAL, "--seeds", "0", "1", "--strategies", "all"]
    run(*flags)
    unbroken = contents()
    assert len(unbroken) == 40
    Path("results").rename("unbroken")
    process = forked(active_learning.main, [*FLAGS, *flags, "--quiet"])
    deadline = time.monotonic() + 60
    while not (FOLDER / "random-seed0.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    part = contents()
    assert (FOLDER / "random-seed0.json").exists() and len(part) < 40
    first_made = (FOLDER / "random-seed0.json").stat().st_mtime_ns
    (FOLDER / ".random-seed0.json.1.part").write_text("half")
    run(*flags)
    assert contents() == unbroken
    assert (FOLDER / "random-seed0.json").stat().st_mtime_ns == first_made  # complete results are not made again
    made = {path: Path(path).stat().st_mtime_ns for path in unbroken}
    capsys.readouterr()
    active_learning.main([*FLAGS, *flags])
    printed = capsys.readouterr()
    assert {path: Path(path).stat().st_mtime_ns for path in unbroken} == made
    assert "less random" in printed.out and printed.out.endswith(f"{FOLDER}\n")


def test_other_flags_need_a_tag_or_overwrite(caches, refusal):
    run("--strategies", "random", "--seeds", "0")
    again = [*FLAGS, "--quiet", "--strategies", "random", "--seeds", "0", "--lr", "0.05"]
    assert "was made with another settings" in refusal(active_learning.main, *again)
    before = contents()
    run("--strategies", "random", "--seeds", "0", "--lr", "0.05", "--tag", "fast")
    assert before.items() < contents().items()
    run("--strategies", "random", "--seeds", "0", "--lr", "0.05", "--overwrite")
    assert result("random")[0]["settings"]["lr"] == 0.05
    write_cache("shifted-test", 77)
    assert "another fingerprint" in refusal(active_learning.main, *again)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--strategies", "magic"], "--strategies must be all, random, random-targeted, "),
        (["--budgets", "26"], r"--budgets 26 is more than the 25 images that the pool offers"),
        (["--budgets", "0"], "--budgets must be 1 or more, not 0"),
        (["--seeds", "-1"], "--seeds must be 0 or more"),
        (["--draws", "1"], "--draws must be 2 or more"),
        (["--k", "0"], "--k must be 1 or more"),
        (["--lr", "nan"], "must be above 0"),
        (["--pool-share", "1.5"], "--pool-share must be above 0 and at most 1"),
        (["--val-counts"], "--val-counts needs --val"),
        (["--val", "shifted-val", "--val-counts", "--budgets", "1"], "leaves no label for the pool"),
        (["--val", "shifted-val", "--val-counts", "0.9", "--budgets", "20"], "is more than the 12 images"),
        (["--val", "shifted-test"], "must name different splits"),
        (["--pool", "test"], "is missing: run `python cache_embeddings.py"),
        (["--factors", "nothing.npz"], "--factors nothing.npz is neither pool, nor a data set"),
        (["--tag", "a/b"], "--tag names a folder"),
    ],
)
def test_mistakes_end_with_one_sentence(caches, refusal, flags, error):
    message = refusal(active_learning.main, *FLAGS, "--quiet", *flags)
    assert error in message and not Path("results").exists()


def test_unsuitable_caches_are_named(caches, refusal):
    call = [active_learning.main, *FLAGS, *VAL, "--quiet"]
    write_cache("shifted-test", 3, labels=False)
    assert "shifted-test has captions and no classes" in refusal(*call)
    write_cache("shifted-test", 3, features="final")
    assert "no pooled features" in refusal(*call)
    write_cache("shifted-test", 3, classes=("red", "blue", "green"))
    assert "other classes than" in refusal(*call)
    write_cache("shifted-test", 3, base=40)
    write_cache("train", 0, base=20)
    assert "'train' and 'shifted-test' share 10 images: name splits that share none" in refusal(*call)
    write_cache("train", 0)
    write_cache("shifted-val", 4, base=40)  # its labels would be the target's
    assert "'shifted-test' and 'shifted-val' share" in refusal(*call)


def test_factors_of_a_data_set_of_captions(caches):
    folder, source = (Path("embeddings", name, "shapes-tiny/train") for name in ("shapes", "shapes-colors"))
    write_cache("train", 5, labels=False)
    folder.parent.mkdir(parents=True)
    source.rename(folder)
    (source / "text.npy").parent.mkdir()
    np.save(source / "text.npy", np.load(folder / "text.npy"))
    write_cache("train", 0)
    run("--strategies", "random-targeted", "--seeds", "0", "--factors", "shapes")
    values, _ = result("random-targeted")
    assert values["fingerprint"]["factors"] == "train-5"
    run("--strategies", "random-targeted", "--seeds", "0", "--tag", "pool")
    of_pool, _ = result("random-targeted", folder=FOLDER.with_name("shifted-test+pool"))
    assert of_pool["prior_precision"] != values["prior_precision"]


def test_a_sigmoid_model_has_the_curvature_of_the_sigmoid_loss(caches):
    for seed, split in enumerate(SIZES):
        write_cache(split, seed, logit_bias=-4.0)
    run("--strategies", "random", "--seeds", "0")
    z, phi, _ = (np.concatenate(pair) for pair in zip(data("train"), data("shifted-train"), strict=True))
    total = 0.0
    for row in z:
        x, length = row / np.linalg.norm(row), np.linalg.norm(row)
        turn, h = (np.eye(D) - np.outer(x, x)) / length, class_means()
        p = 1 / (1 + np.exp(4 - SCALE * (h @ x)))
        total = total + SCALE**2 * turn @ h.T @ np.diag(p * (1 - p)) @ h @ turn
    factors = Factors(torch.from_numpy(phi.T @ phi / np.sqrt(50)), torch.from_numpy(total / np.sqrt(50)), 50)
    posterior = Posterior(factors, np.square(weights()).sum(), 10.0)
    assert result("random")[0]["prior_precision"] == pytest.approx(posterior.precision, rel=1e-3)


def test_the_printed_table_holds_means_and_differences(caches):
    run(*VAL, "--seeds", "0", "1", "2", "--strategies", "random", "entropy")
    cells = {(s, n): result(n, s)[0] for s in (0, 1, 2) for n in ("random", "entropy")}
    lines = curves_text(cells, {}).splitlines()
    part = lines[lines.index(next(line for line in lines if line.startswith("NLL"))) :]
    values = {n: np.array([[p["nll"] for p in cells[s, n]["curve"]] for s in (0, 1, 2)]) for n in ("random", "entropy")}
    row = next(line for line in part if line.startswith("  entropy"))
    assert row.split()[1:] == [
        text
        for column in (*values["entropy"].T, values["entropy"].mean(axis=1))
        for text in (f"{column.mean():.3f}", "±", f"{column.std(ddof=1):.3f}")
    ]
    gap = (values["entropy"] - values["random"])[:, 0]
    half = stats.t.ppf(0.975, 2) * gap.std(ddof=1) / np.sqrt(3)
    assert f"{gap.mean():+.3f} ± {half:.3f}" in part[part.index("  less random, 95 % interval") + 1]
    assert max(map(len, lines)) <= 128


def test_published_factors_are_read(caches):
    rng = np.random.default_rng(0)
    factors = {f"{side}_{t}": np.cov(rng.normal(size=(s, 40))) for t in ("img", "txt") for side, s in
               (("A", P + 1 if t == "img" else D), ("B", D))}  # fmt: skip
    np.savez("factors.npz", **factors)
    run("--strategies", "bald", "--seeds", "0", "--factors", "factors.npz")
    posterior = Posterior(
        Factors(*(torch.from_numpy(factors[n]) for n in ("A_img", "B_img")), 327680), np.square(weights()).sum(), 10.0
    )
    assert result("bald")[0]["prior_precision"] == pytest.approx(posterior.precision, rel=1e-4)


def test_the_classifier_starts_from_the_cached_embeddings():
    torch.manual_seed(0)
    weight, phi = torch.randn(D, P), torch.randn(5, P)
    items = Items(phi @ weight.T + 3, phi, torch.zeros(5))  # 3: a residual beside the map
    classifier = Classifier(weight, torch.randn(C, D), 2.0)
    assert torch.equal(classifier.embed(items), items.embedding)
    assert torch.allclose(
        classifier(items), 2 * F.cosine_similarity(items.embedding[:, None], classifier.classes, dim=2)
    )
    with torch.no_grad():
        classifier.weight.add_(1)
    assert torch.allclose(classifier.embed(items), phi @ (weight + 1).T + 3, atol=1e-5)
    assert [name for name, _ in classifier.named_parameters()] == ["weight"]
