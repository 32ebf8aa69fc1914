"""active_learning.py at tiny sizes: every number of a result against a slow script of its own, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import active_learning
from datasets.embeddings import LAYOUT
from labeling import strategies
from labeling.classifier import Classifier, Items
from labeling.strategies import STRATEGIES, Choice
from models.laplace import Factors, Posterior
from reporting.curves import curves_text

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
    """A cache of random features as cache_embeddings.py lays it out, two prompts per class."""
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
        "fingerprint": f"{split}-{seed}", "dim": D, "images": len(label), "captions": 2 * C,
        "logit_scale": SCALE, "logit_bias": logit_bias, "complete": True,
        "files": [*(f"{name}.npy" for name in arrays), "projection.npz"],
    }  # fmt: skip
    if labels:
        meta["classes"] = list(classes)
    else:
        np.save(folder / "image_of_text.npy", np.zeros(2 * C, np.int64))
        meta["files"].append("image_of_text.npy")
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


# A slow script of its own, in float64.


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
    """AdamW by hand, on the gradient by hand."""
    start, h, generator = weights(), class_means(), torch.Generator().manual_seed(seed)
    weight, m, v, step = start.copy(), 0.0, 0.0, 0
    best = (np.inf, 0, start)
    for epoch in range(epochs + 1):
        if epoch:
            for rows in torch.randperm(len(part[2]), generator=generator).split(batch):
                z, phi, label = (x[rows.numpy()] for x in part)
                gradient = np.zeros_like(weight)
                for row, f, own in zip(z + phi @ (weight - start).T, phi, label, strict=True):
                    x, length = row / np.linalg.norm(row), np.linalg.norm(row)
                    error = softmax(SCALE * (h @ x)[None])[0] - np.eye(C)[own]
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


def slow_auroc(doubt, hit):
    pairs = [(a > b) + (a == b) / 2 for a in doubt[hit == 0] for b in doubt[hit == 1]]
    return np.mean(pairs)


def assert_figures(found, probability, label):
    hit, entropy = (probability.argmax(axis=1) == label).astype(float), -(probability * np.log(probability)).sum(axis=1)
    assert found["accuracy"] == pytest.approx(hit.mean(), abs=1e-9)
    assert found["nll"] == pytest.approx(-np.log(probability[np.arange(len(label)), label]).mean(), rel=1e-3)
    assert found["ece"] == pytest.approx(slow_ece(probability.max(axis=1), hit), abs=1e-3)
    assert found["entropy_auroc"] == pytest.approx(slow_auroc(entropy, hit), abs=1e-9)
    by, order = found["by_entropy"], np.argsort(entropy)
    assert by["count"] == [4] * 10
    assert by["entropy"] == pytest.approx([entropy[order[4 * i : 4 * i + 4]].mean() for i in range(10)], abs=1e-3)
    assert by["error"] == pytest.approx([1 - hit[order[4 * i : 4 * i + 4]].mean() for i in range(10)], abs=1e-9)


def pool_of(seed):
    """What is on offer, as rows of the whole pool, and the generator after it and the order of val were drawn."""
    generator = torch.Generator().manual_seed(seed)
    offer = torch.randperm(50, generator=generator)[:25].sort().values.numpy()
    return offer, generator


def slow_order(strategy, offer, generator):
    """Rows of what is on offer, by loops."""
    pool = tuple(np.concatenate(pair)[offer] for pair in zip(data("train"), data("shifted-train"), strict=True))
    target, weight = data("shifted-test"), weights()
    shuffled = torch.randperm(25 if strategy == "random" else 40, generator=generator).tolist()
    if strategy == "random":
        return shuffled[:8]
    if strategy == "entropy":
        return np.argsort(-slow_entropy(weight, pool), kind="stable")[:8].tolist()
    if strategy == "k-center":
        unit = [row / np.linalg.norm(row) for row in pool[0]]
        chosen = [int(np.argmin([np.linalg.norm(row - np.mean(unit, axis=0)) for row in unit]))]
        while len(chosen) < 8:
            chosen.append(int(np.argmax([min(np.linalg.norm(row - unit[i]) for i in chosen) for row in unit])))
        return chosen
    order = shuffled if strategy == "random-targeted" else np.argsort(-slow_entropy(weight, target), kind="stable")
    return nearest_first(pool, target, order)


def slow_curvature(row, h):
    """Gauss-Newton matrix (D, D) of the cross-entropy of one embedding against unit classes (C, D)."""
    x, length = row / np.linalg.norm(row), np.linalg.norm(row)
    p = softmax(SCALE * (h @ x)[None])[0]
    turn = (np.eye(D) - np.outer(x, x)) / length
    return SCALE**2 * turn @ h.T @ (np.diag(p) - np.outer(p, p)) @ h @ turn


def spreads(part):
    """Variances of all coordinates of an embedding, summed, under the pool's damped posterior: dense linear algebra."""
    z, phi, _ = (np.concatenate(pair) for pair in zip(data("train"), data("shifted-train"), strict=True))
    h = class_means()
    a, b, n = phi.T @ phi / np.sqrt(50), sum(slow_curvature(row, h) for row in z) / np.sqrt(50), 10.0
    precision = json.loads((FOLDER / "random-seed0.json").read_text())["prior_precision"]
    left = np.linalg.inv(np.sqrt(n) * b + np.sqrt(precision) * np.eye(D))
    right = np.linalg.inv(np.sqrt(n) * a + np.sqrt(precision) * np.eye(P + 1))
    slope = []
    for value in (precision * 0.99, precision * 1.01):  # of the evidence: it is at its top
        evidence = 0.5 * D * (P + 1) * np.log(value) - 0.5 * value * np.square(weights()).sum()
        evidence -= 0.5 * D * np.linalg.slogdet(np.sqrt(n) * a + np.sqrt(value) * np.eye(P + 1))[1]
        slope.append(evidence - 0.5 * (P + 1) * np.linalg.slogdet(np.sqrt(n) * b + np.sqrt(value) * np.eye(D))[1])
    assert abs(slope[1] - slope[0]) < 1e-2 * D * (P + 1) * 0.02
    return np.array([np.trace(left) * (f @ right @ f) for f in part[1]])


def nearest_first(pool, target, order):
    expected = [np.sqrt((part[0] ** 2).sum(axis=1) + spreads(part)) for part in (pool, target)]
    found = []
    near = (target[0] @ pool[0].T) / np.outer(expected[1], expected[0])
    for rank in range(25):
        for row in order:
            best = int(np.argsort(-near[row])[rank])
            if best not in found:
                found.append(best)
    return found[:8]


@pytest.mark.parametrize("counted", [False, True])
def test_a_slow_script_finds_every_number(caches, counted):
    checked = ["random", "random-targeted", "entropy", "entropy-targeted", "k-center"]
    run(*VAL, *["--val-counts"] * counted, "--seeds", "0", "3", "--strategies", *checked)
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
            for at, (point, budget) in enumerate(zip(values["curve"], (3, 8), strict=True)):
                spent = {3: 1, 8: 2}[budget] if counted else 0
                assert (point["budget"], point["labels"]) == (budget, budget - spent)
                assert point["val_labels"] == (spent or 12)
                mine = tuple(part[held_out[:spent]] for part in val) if counted else val
                weight, epoch = slow_fine_tune(tuple(part[order[: budget - spent]] for part in whole), mine, seed)
                assert point["epoch"] == epoch
                epochs.append(epoch)
                probability = softmax(slow_logits(weight, *test[:2]))
                assert_figures(point, probability, test[2])
                assert np.allclose(arrays["nll"][at], slow_nll(weight, test), rtol=1e-3, atol=1e-3)
                assert np.allclose(arrays["confidence"][at], probability.max(axis=1), atol=1e-3)
                assert (arrays["hit"][at] == (probability.argmax(axis=1) == test[2])).all()
                assert np.allclose(arrays["entropy"][at], slow_entropy(weight, test), atol=1e-3)
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
    """Mutual information of each item's and a random target's label, from the joint table of every pair."""
    found = np.zeros(pool.shape[1])
    for i in range(pool.shape[1]):
        for t in range(target.shape[1]):
            joint = np.mean([np.outer(pool[k, i], target[k, t]) for k in range(len(pool))], axis=0)
            outer = np.outer(joint.sum(axis=1), joint.sum(axis=0))
            found[i] += (joint * np.log(joint / outer)).sum() / target.shape[1]
    return found


@pytest.mark.parametrize("published", [False, True])
def test_epig_takes_the_best_of_what_is_left_and_learns_of_it(caches, monkeypatch, published):
    told, asked, taken, told_best = [], [], [], []
    kept = strategies.epig, strategies.probabilities, strategies.select

    def spied_epig(pool, target, corrected=True):
        score = kept[0](pool, target, corrected)
        told.append((pool.double().numpy(), target.double().numpy(), corrected, score))
        return score

    def spied_probabilities(choice, posterior, *parts):
        asked.append(posterior)
        return kept[1](choice, posterior, *parts)

    def spied_select(score, budget):
        taken.append(len(score))
        told_best.append(int(score.argmax()))
        return kept[2](score, budget)

    monkeypatch.setattr(strategies, "epig", spied_epig)
    monkeypatch.setattr(strategies, "probabilities", spied_probabilities)
    monkeypatch.setattr(strategies, "select", spied_select)
    preset = ["--preset", "published"] if published else []
    run(*VAL, "--strategies", "epig", "--seeds", "0", *preset)
    folder = FOLDER.with_name("shifted-test+published") if published else FOLDER
    values, _ = result("epig", folder=folder)
    assert taken == list(range(9, 1, -1)) and len(set(zip(values["chosen_split"], values["chosen_id"]))) == 8
    for pool, target, corrected, score in told:
        assert pool.shape[0] == 12 and target.shape == (12, 4, C) and corrected is not published
        bias = 0 if published else slow_information(pool, np.roll(target, 6, axis=0))
        assert np.allclose(score, slow_information(pool, target) - bias, atol=2e-5)
    # What each score is by, from the start: the factors of all of the pool, and ten times each pick before.
    pool, h = {split: data(split)[:2] for split in ("train", "shifted-train")}, class_means()
    z, phi = (np.concatenate(pair) for pair in zip(*pool.values(), strict=True))
    a, b = phi.T @ phi, sum(slow_curvature(row, h) for row in z)
    start, count, precisions = b, 50, set()
    for posterior, split, row in zip(asked, values["chosen_split"], values["chosen_id"], strict=True):
        factors = posterior.spectrum.factors
        assert factors.count == count
        for found, expected in ((factors.a, a), (factors.b, b)):
            assert np.linalg.norm(found.numpy() * np.sqrt(count) - expected) < 1e-4 * np.linalg.norm(expected)
        again = Posterior(factors, np.square(weights()).sum(), 10.0)
        assert posterior.precision == pytest.approx(again.precision, rel=1e-4) and posterior.n == 10
        precisions.add(posterior.precision)
        picked, one = (part[row] for part in pool[split])
        a = a + 10 * ((one @ one) * np.ones_like(a) if published else np.outer(one, one))
        b, count = b + 10 * slow_curvature(picked, h), count + (1 if published else 10)
    assert np.linalg.norm(b) > 1.5 * np.linalg.norm(start) and len(precisions) == 8


def regions(published, seed=0):
    """A posterior of 20 inputs; the pool is of two halves of them, which have nothing in common, the target of one."""
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
                    reference=published, candidates=80, targets=60, weight=1)  # fmt: skip
    return (STRATEGIES["epig"](choice) < 40).float().mean().item()


def test_epig_stays_with_the_target_and_the_published_one_does_not():
    assert regions(False) >= 0.9
    assert 0.25 <= np.mean([regions(True, seed) for seed in range(2)]) <= 0.75


@pytest.mark.parametrize("published", [False, True])
def test_draws_of_two_parts_are_of_one_map_unless_published(published):
    torch.manual_seed(0)
    weight, classes, phi = torch.randn(D, P), torch.randn(C, D), torch.randn(2, P)
    items = Items(phi @ weight.T, phi, torch.zeros(2, dtype=torch.long))
    # The one that is given, which has learned of picks, and not the one from the start.
    posterior, start = (Posterior(Factors(torch.eye(P), torch.eye(D), 10), 1.0, 1.0, precision=p) for p in (30.0, 5.0))
    choice = Choice(items, items, Classifier(weight, classes, 3.0), start, {}, 1, torch.Generator().manual_seed(1),
                    draws=4000, reference=published)  # fmt: skip
    one, two = (part.log() for part in strategies.probabilities(choice, posterior, items, items))
    assert torch.equal(one, two) is not published
    gap = (one[..., :1] - one[..., 1:]).double()  # of logits, of which the probabilities leave nothing else
    # By the textbook: coordinates of an embedding are independent, of variance v.
    v = 1 / (1 + 30**0.5) * (phi.double().square().sum(dim=1) / (1 + 30**0.5))
    unit, g = F.normalize(classes.double(), dim=1), items.embedding.double()
    if published:
        correlation = np.corrcoef(gap[:, 0, 0], (two[..., :1] - two[..., 1:])[:, 0, 0])[0, 1]
        assert abs(correlation) < 0.06
        length = (g.square().sum(dim=1) + D * v).sqrt()  # its mean
        mean = 3 * g @ unit.T / length[:, None]
        variance = 9 * v / length**2  # of every logit, as classes have length 1
        assert torch.allclose(gap.mean(dim=0), mean[:, :1] - mean[:, 1:], atol=0.06)
        assert torch.allclose(gap.var(dim=0), 2 * variance[:, None].expand(-1, C - 1), rtol=0.1)
    else:
        x, length = F.normalize(g, dim=1), g.norm(dim=1)
        apart = unit[:1] - unit[1:]
        across = apart.square().sum(dim=1) - (x @ apart.T).square()  # to first order in what is drawn
        assert torch.allclose(gap.var(dim=0), (9 * v / length**2)[:, None] * across, rtol=0.1)


def test_bald_goes_next_to_where_drawn_weights_disagree(caches, monkeypatch):
    seen = []
    kept = strategies.bald
    monkeypatch.setattr(strategies, "bald", lambda samples: seen.append(samples.double().numpy()) or kept(samples))
    run(*VAL, "--strategies", "random", "bald", "--seeds", "0")  # random's file holds the precision that spreads reads
    (samples,) = seen
    entropy = -(samples * np.log(samples)).sum(axis=2)
    mean = samples.mean(axis=0)
    order = np.argsort(entropy.mean(axis=0) + (mean * np.log(mean)).sum(axis=1), kind="stable")
    pool = tuple(np.concatenate(pair)[pool_of(0)[0]] for pair in zip(data("train"), data("shifted-train"), strict=True))
    chosen = pool_of(0)[0][nearest_first(pool, data("shifted-test"), order)]
    assert result("bald")[0]["chosen_id"] == [row if row < 30 else row - 30 for row in chosen]


@pytest.mark.parametrize("name", STRATEGIES)
def test_smaller_budgets_are_the_beginning_of_larger_ones_and_no_label_is_seen(caches, name):
    run(*VAL, "--strategies", name, "--seeds", "2", "--k", "2", "--similarity", "wasserstein")
    large = result(name, 2)[0]
    for split in ("train", "shifted-train", "shifted-test"):
        path = Path("embeddings/shapes-colors/shapes-tiny", split, "label.npy")
        np.save(path, (np.load(path) + 1) % C)
    small = ["--budgets", "3", "--k", "2", "--similarity", "wasserstein", "--tag", "small"]
    # What EPIG looks at depends on the largest budget where that is more than --epig-pool only.
    run(*VAL, "--strategies", name, "--seeds", "2", *small)
    found = result(name, 2, FOLDER.with_name("shifted-test+small"))[0]
    assert found["chosen_id"] == large["chosen_id"][:3] and found["chosen_split"] == large["chosen_split"][:3]
    assert len(set(zip(large["chosen_split"], large["chosen_id"], strict=True))) == 8


def contents():
    return {str(path): path.read_bytes() for path in sorted(Path("results").glob("**/*.[jn]*")) if path.is_file()}


def test_killed_and_called_again_the_results_are_the_same(caches, capsys):
    flags = [*VAL, "--seeds", "0", "1", "--strategies", "all"]
    run(*flags)
    unbroken = contents()
    assert len(unbroken) == 28
    Path("results").rename("unbroken")
    command = [sys.executable, str(Path(active_learning.__file__)), *FLAGS, *flags, "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (FOLDER / "random-seed0.json").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    part = contents()
    assert (FOLDER / "random-seed0.json").exists() and len(part) < 28
    there = (FOLDER / "random-seed0.json").stat().st_mtime_ns
    (FOLDER / ".random-seed0.json.1.part").write_text("half")
    run(*flags)
    assert contents() == unbroken
    assert (FOLDER / "random-seed0.json").stat().st_mtime_ns == there  # what was done is not made again
    made = {path: Path(path).stat().st_mtime_ns for path in unbroken}
    capsys.readouterr()
    active_learning.main([*FLAGS, *flags])
    said = capsys.readouterr()
    assert {path: Path(path).stat().st_mtime_ns for path in unbroken} == made
    assert "less random" in said.out and said.out.endswith(f"{FOLDER}\n")


def test_other_flags_need_a_name_or_overwriting(caches, refusal):
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
        (["--strategies", "magic"], "there is no strategy 'magic'; there is all, or any of random"),
        (["--budgets", "26"], r"--budgets 26 is more than the 25 images that the pool offers"),
        (["--budgets", "0"], "--budgets must be 1 or more, not 0"),
        (["--seeds", "-1"], "--seeds must be 0 or more"),
        (["--draws", "1"], "--draws must be 2 or more"),
        (["--k", "0"], "--k must be 1 or more"),
        (["--lr", "nan"], "must be above 0"),
        (["--pool-share", "1.5"], "--pool-share must be above 0 and at most 1"),
        (["--val-counts"], "--val-counts wants --val"),
        (["--val", "shifted-val", "--val-counts", "--budgets", "1"], "leaves no label for the pool"),
        (["--val", "shifted-val", "--val-counts", "0.9", "--budgets", "20"], "is more than the 12 images"),
        (["--val", "shifted-test"], "must name different splits"),
        (["--pool", "test"], "is missing: run `python cache_embeddings.py"),
        (["--factors", "nothing.npz"], "--factors nothing.npz is neither pool, nor a data set"),
        (["--tag", "a/b"], "--tag names a folder"),
    ],
)
def test_mistakes_end_with_one_sentence(caches, refusal, flags, error):
    said = refusal(active_learning.main, *FLAGS, "--quiet", *flags)
    assert error in said and not Path("results").exists()


def test_caches_that_will_not_do_are_named(caches, refusal):
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
    write_cache("shifted-val", 4, base=40)  # whose labels would be the target's
    assert "'shifted-test' and 'shifted-val' share" in refusal(*call)


def test_factors_of_captions_elsewhere(caches):
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
    run("--strategies", "random-targeted", "--seeds", "0", "--tag", "own")
    assert (
        result("random-targeted", folder=FOLDER.with_name("shifted-test+own"))[0]["prior_precision"]
        != (values["prior_precision"])
    )


def test_a_sigmoid_model_has_its_own_curvature(caches):
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


def test_the_table_says_means_and_differences(caches):
    run(*VAL, "--seeds", "0", "1", "2", "--strategies", "random", "entropy")
    cells = {(s, n): result(n, s)[0] for s in (0, 1, 2) for n in ("random", "entropy")}
    lines = curves_text(cells).splitlines()
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


def test_published_factors_are_taken(caches):
    rng = np.random.default_rng(0)
    factors = {f"{side}_{t}": np.cov(rng.normal(size=(s, 40))) for t in ("img", "txt") for side, s in
               (("A", P + 1 if t == "img" else D), ("B", D))}  # fmt: skip
    np.savez("factors.npz", **factors)
    run("--strategies", "bald", "--seeds", "0", "--factors", "factors.npz")
    posterior = Posterior(
        Factors(*(torch.from_numpy(factors[n]) for n in ("A_img", "B_img")), 327680), np.square(weights()).sum(), 10.0
    )
    assert result("bald")[0]["prior_precision"] == pytest.approx(posterior.precision, rel=1e-4)


def test_the_classifier_starts_as_the_cache_has_it():
    torch.manual_seed(0)
    weight, phi = torch.randn(D, P), torch.randn(5, P)
    items = Items(phi @ weight.T + 3, phi, torch.zeros(5))  # 3: what is not the map's
    classifier = Classifier(weight, torch.randn(C, D), 2.0)
    assert torch.equal(classifier.embed(items), items.embedding)
    assert torch.allclose(
        classifier(items), 2 * F.cosine_similarity(items.embedding[:, None], classifier.classes, dim=2)
    )
    with torch.no_grad():
        classifier.weight.add_(1)
    assert torch.allclose(classifier.embed(items), phi @ (weight + 1).T + 3, atol=1e-5)
    assert [name for name, _ in classifier.named_parameters()] == ["weight"]
