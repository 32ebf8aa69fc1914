"""Evaluation: every figure of a result file recomputed slowly, and every refusal."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from check_method import SMALL_WORLD
from conftest import made_once, write_classes
from scipy import sparse, stats

import cache_embeddings
import eval as evaluation
import train
import uncertainty
from datasets.classification import Classification
from datasets.embeddings import Pairs
from datasets.shapes import VALUES
from metrics.calibration import halves
from metrics.uncertainty import bootstrap
from tasks import made_with as provenance
from tasks import retrieval
from utils.checkpoint import Run
from utils.config import load_config

RUN = ["--dataset", "shapes", "--method", "asymvlm-vmf"]
RESULT = "results/shapes/shapes-tiny/{}/seed0/shapes-retrieval"


@pytest.fixture(scope="session")
def trained_once(small_world, tmp_path_factory):
    def make():
        Path("embeddings").symlink_to(small_world / "embeddings")
        short = ["--val-fraction", "0", "--set", "train.epochs=6", "train.batch_size=128"]
        train.main([*RUN, "--quiet", "--device", "cpu", *short])

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture
def trained(world, trained_once):
    shutil.copytree(trained_once / "checkpoints", world / "checkpoints")
    return world


def slow(scores, positives, k):
    """Chance that a positive is among the k best of each row if tied items are in random order, by a loop."""
    tied_rows = []
    for row, items in zip(scores, positives, strict=True):
        best = row[items].max()
        others = np.delete(row, items)
        better, tied, tied_positives = (others > best).sum(), (others == best).sum(), (row[items] == best).sum()
        places = min(max(k - better, 0), tied + tied_positives)
        tied_rows.append((tied + tied_positives, tied_positives, places))
    return 1 - stats.hypergeom.pmf(0, *np.transpose(tied_rows))


def slow_uncertainty(uncertainty, hits, count, limit, truth):
    """Every figure of an uncertainty by its definition: hits {k: (Q,)}; limit, truth (Q,) or None."""
    order = np.argsort(uncertainty, kind="stable")
    groups = [order[rows] for rows in np.array_split(np.arange(len(uncertainty)), count)]
    figures = {"levels": {"count": [len(rows) for rows in groups]}}
    figures["levels"]["uncertainty"] = [[uncertainty[rows].min(), uncertainty[rows].max()] for rows in groups]

    same = (uncertainty[:, None] == uncertainty).astype(float)
    ties = same.sum(axis=1)

    def by_level(values):  # tied queries, such as captions of the same words, are in random order
        even = same @ values / ties
        return [even[rows].mean() for rows in groups]

    figures["levels"]["recall"] = {str(k): by_level(hit) for k, hit in hits.items()}
    if limit is not None:
        figures["levels"]["bayes_recall"] = by_level(limit)
    recalls = np.array(figures["levels"]["recall"]["1"])
    figures["s"] = stats.spearmanr(range(count), recalls).statistic
    figures["r2"] = stats.linregress(range(count), recalls).rvalue ** 2
    figures["minus_s_r2"] = -figures["s"] * figures["r2"]
    figures["spread"] = recalls[0] - recalls[-1]
    hit = hits[1]
    wrong, right = uncertainty[hit == 0], uncertainty[hit == 1]
    figures["auroc"] = stats.mannwhitneyu(wrong, right).statistic / len(wrong) / len(right)
    kept = [uncertainty <= threshold for threshold in np.unique(uncertainty)]
    steps = np.diff([0, *(hit[rows].sum() for rows in kept)]) / hit.sum()
    figures["aupr"] = sum(step * hit[rows].mean() for step, rows in zip(steps, kept, strict=True))
    even = (same @ hit / ties)[order]
    risk = [1 - even[:answered].mean() for answered in range(1, len(hit) + 1)]
    best = [1 - np.sort(hit)[::-1][:answered].mean() for answered in range(1, len(hit) + 1)]
    figures["aurc"], figures["e_aurc"] = np.mean(risk), np.mean(risk) - np.mean(best)
    wrongs = [risk[answered - 1] * answered / len(hit) for answered in range(1, len(hit) + 1)]
    figures["augrc"] = np.mean(wrongs)
    allowed = [answered for answered in range(1, len(hit) + 1) if risk[answered - 1] <= 0.05 + 1e-12]
    figures["selective_coverage"] = {"5": max(allowed, default=0) / len(hit)}
    thresholds = np.unique(uncertainty)
    shares = [((wrong <= t).mean(), (right <= t).mean()) for t in thresholds]
    figures["fpr95_right"] = min(of_wrong for of_wrong, of_right in shares if of_right >= 0.95)
    shares = [((wrong >= t).mean(), (right >= t).mean()) for t in thresholds]
    figures["fpr95_wrong"] = min(of_right for of_wrong, of_right in shares if of_wrong >= 0.95)
    figures["selective_recall"] = {str(c): 1 - risk[round(c * len(hit) / 100) - 1] for c in (80, 90, 95)}
    if truth is not None:
        figures["spearman"] = stats.spearmanr(uncertainty, truth)[0]
        figures["kendall"] = stats.kendalltau(uncertainty, truth)[0]
    return figures


def slow_calibration(posterior, positives, scale, shares):
    """Every figure of a posterior (Q, G) by its definition; positives: the items of each query.

    shares (G,): the image of every answer; the confidence is the total posterior of its captions.
    """
    top = posterior.argmax(axis=1)
    hit = np.array([t in items for t, items in zip(top, positives, strict=True)], dtype=float)
    confidence = np.array([row[shares == shares[t]].sum() for row, t in zip(posterior, top, strict=True)])
    of_positives = np.array([row[items].sum() for row, items in zip(posterior, positives, strict=True)])
    others = np.array([np.delete(row, items) for row, items in zip(posterior, positives, strict=True)], dtype=object)
    figures = {"nll": -np.log(of_positives).mean(), "scales": scale}
    figures["brier"] = np.mean([(1 - m) ** 2 + (np.array(o, float) ** 2).sum() for m, o in zip(of_positives, others)])
    for bins in (15, 20):
        error = 0
        for low in range(bins):
            inside = (confidence >= low / bins) & ((confidence < (low + 1) / bins) | (low == bins - 1))
            if inside.any():
                error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
        figures[f"ece_{bins}"] = error
    parts = np.array_split(np.argsort(confidence), 15)
    low = [np.flatnonzero(np.minimum((15 * confidence).astype(int), 14) == part) for part in range(15)]
    low = [rows for rows in low if len(rows)]
    figures["reliability"] = {"count": [len(rows) for rows in low], "confidence": [confidence[r].mean() for r in low]}
    figures["reliability"]["accuracy"] = [hit[rows].mean() for rows in low]
    figures["adaptive_ece"] = sum(len(p) * abs(hit[p].mean() - confidence[p].mean()) for p in parts) / len(hit)
    return figures


# Checked by themselves: tests/test_calibration.py, tests/test_metrics.py.
APART = {"interval", "family", "log_score", "brier_score", "ece_15_expected", "ece_15_limit"}


def agrees(figures, expected, tolerance=1e-4):
    """Compare nested figures with expected ones, which lack only those that are checked APART."""
    if isinstance(expected, dict):
        assert figures.keys() - APART == expected.keys()
        for name, value in expected.items():
            # Confidences that differ by rounding alone may fall on both sides of an edge.
            agrees(figures[name], value, 2e-3 if name == "adaptive_ece" else tolerance)
    else:
        assert np.array(figures) == pytest.approx(np.array(expected), rel=1e-4, abs=tolerance)


def test_a_result_says_what_it_was_made_with(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path, *words], check=True)

    def made():
        provenance._commit.cache_clear()
        values = provenance.made_with(torch.device("cpu"))
        return values["commit"], values["clean"]

    monkeypatch.setattr(provenance, "HOME", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert made() == (None, None)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    head = (tmp_path / ".git" / (tmp_path / ".git/HEAD").read_text().split()[1]).read_text().strip()
    assert made() == (head, True)
    (tmp_path / "new.py").touch()
    assert made() == (head, False)
    provenance._commit.cache_clear()
    values = provenance.made_with(torch.device("cpu"))
    assert values["device"] == "cpu" and values["versions"].keys() == {"torch", "numpy", "scipy", "python"}
    assert values["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(("method", "levels"), [("asymvlm-vmf", 10), ("asymvlm-vmf", 7), ("pfe", 10)])
def test_every_figure_by_a_slow_script(world, method, levels):
    run = ["--dataset", "shapes", "--method", method, "--device", "cpu"]
    short = ["--val-fraction", "0", "--set", "train.epochs=6", "train.batch_size=128", "model.width=64"]
    train.main([*run, "--quiet", *short])
    evaluation.main([*run, "--uncer_levels", str(levels)])
    path = world / (RESULT.format(method) + ".json")
    result, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    pairs, run = Pairs("shapes", "shapes-tiny", "val"), Run(load_config("shapes", method))
    adaptor, _, _ = run.load("cpu")
    assert result["made_with"] == provenance.made_with(torch.device("cpu")) and result["config"]["seed"] == 0
    assert (result["fingerprint"], result["checkpoint"]) == (pairs.meta["fingerprint"], run.weights_hash())
    with torch.inference_mode():
        image = adaptor.adapt_image(torch.tensor(np.array(pairs.image)).float())
        text = adaptor.adapt_text(torch.tensor(np.array(pairs.text)).float())
        scores = adaptor.log_likelihood(image, text).numpy()
    true, owner = pairs.matches.toarray(), pairs.image_of_text
    count = true.sum(axis=0)
    own_texts = [np.flatnonzero(owner == i) for i in range(len(pairs.image))]
    uncertainties = {"text": text.uncertainty.double().numpy()}
    if image.uncertainty is not None:
        uncertainties["image"] = image.uncertainty.double().numpy()
    sides = {
        "text_to_image": (scores.T, [[i] for i in owner], "text", "image", true.T, 1 / count),
        "image_to_text": (scores, own_texts, "image", "text", true, arrays["image_to_text_limit"]),
    }
    recalls = []
    for side, (rows, positives, query, answer, fits, limit) in sides.items():
        part, hits = result[side], {k: slow(rows, positives, k) for k in (1, 5, 10)}
        recalls += [hit.mean() for hit in hits.values()]
        assert part["queries"] == len(rows)
        assert part["recall"] == {str(k): pytest.approx(hit.mean()) for k, hit in hits.items()}
        ranks = [(row > row[items].max()).sum() + 1 for row, items in zip(rows, positives, strict=True)]
        assert part["median_rank"] == np.median(ranks)
        assert part["bayes_recall"] == pytest.approx(limit.mean())
        assert part["regret"] == pytest.approx((limit - hits[1]).mean())
        at_r = []
        for row, positive in zip(rows, fits, strict=True):
            # Musgrave et al.: precision at every positive of the first R; two scores may tie, in either order.
            for order in (np.argsort(-row, kind="stable"), np.lexsort([-np.arange(len(row)), -row])):
                relevant = positive[order][: positive.sum()]
                precision = np.cumsum(relevant) / np.arange(1, len(relevant) + 1)
                at_r.append([(precision * relevant).sum() / len(relevant), relevant.mean()])
        assert [part["map_at_r"], part["r_precision"]] == pytest.approx(np.mean(at_r, axis=0), abs=1e-6)
        best, second = -np.sort(-rows, axis=1)[:, :2].T
        posterior = torch.tensor(rows).double().mul(adaptor.posterior_scale).softmax(dim=1).numpy()
        gallery = {"top": -best, "margin": second - best, "probability": -posterior.max(axis=1)}
        gallery |= {"entropy": stats.entropy(posterior, axis=1)}
        signs = {"score": "top", "margin": "margin", "probability": "probability"}
        stored = {name: -arrays[f"{side}_{field}"] for field, name in signs.items()}
        stored["entropy"] = arrays[f"{side}_entropy"]
        for name, values in gallery.items():
            assert stored[name] == pytest.approx(values, rel=1e-4, abs=1e-4)
        expected = stored  # in float32, whose rounding may change the order of neighbors
        if query in uncertainties:
            expected["query"] = uncertainties[query]
        if answer in uncertainties:
            expected["retrieved"] = uncertainties[answer][rows.argmax(axis=1)]
        if len(uncertainties) == 2:
            expected["sum"] = expected["query"] + expected["retrieved"]
        frozen = np.array(pairs.text if query == "text" else pairs.image, dtype=np.float64)
        free = {"length": np.sqrt((frozen**2).sum(axis=1))}
        if query == "text":
            free["words"] = np.array([-len(caption.split()) for caption in pairs.items["text"]], dtype=float)
        expected |= free
        assert part["uncertainty"].keys() == expected.keys()
        assert part["levels_by"] == ("query" if query in uncertainties else "retrieved")
        truth = np.log(count) if query == "text" else None
        for name, values in expected.items():
            agrees(part["uncertainty"][name], slow_uncertainty(values, hits, levels, limit, truth))
            family = "query-only" if name in ("query", *free) else "gallery-aware"
            assert part["uncertainty"][name]["family"] == family
        assert arrays[f"{side}_uncertainty"] == pytest.approx(expected[part["levels_by"]])
        assert arrays[f"{side}_hit"] == pytest.approx(hits[1])
        shares = np.arange(len(own_texts)) if query == "text" else owner
        agrees(part["calibration"]["model"], slow_calibration(posterior, positives, [adaptor.posterior_scale], shares))
        # Images are drawn; tests/test_metrics.py compares bootstrap itself with a loop.
        for name, values in expected.items():
            drawn = bootstrap(values, arrays[f"{side}_hit"], levels, owner if query == "text" else np.arange(len(rows)))
            assert part["uncertainty"][name]["interval"] == drawn
        # Each half is evaluated with the temperature fitted on the other.
        groups = owner if query == "text" else np.arange(len(rows))
        half, scaled = halves(groups), np.empty(rows.shape)
        scales = part["calibration"]["temperature"]["scales"]
        for fitted, scale in ((half, scales[0]), (~half, scales[1])):
            scaled[~fitted] = torch.tensor(rows[~fitted]).double().mul(scale).softmax(dim=1).numpy()

            def nll(factor, fitted=fitted, scale=scale, rows=rows, positives=positives):
                share = torch.tensor(rows[fitted]).double().mul(scale * factor).softmax(dim=1).numpy()
                of_half = [positives[row] for row in np.flatnonzero(fitted)]
                return -np.mean([np.log(p[items].sum()) for p, items in zip(share, of_half, strict=True)])

            assert nll(1) <= min(nll(1.03), nll(0.97))
        agrees(part["calibration"]["temperature"], slow_calibration(scaled, positives, scales, shares))
        # Examples are the most and the least certain distinct wordings, each with its best-scored answers.
        names = pairs.items["text"] if query == "text" else pairs.items["image"]
        answers = pairs.items["image"] if query == "text" else pairs.items["text"]
        values = expected[part["levels_by"]]
        for name, order in (("most_certain", np.argsort(values)), ("least_certain", np.argsort(-values))):
            shown = part["examples"][name]
            assert len(shown) == 10 == len({example["query"] for example in shown})
            distinct = list(dict.fromkeys(names[row] for row in order))[:10]
            assert sorted(values[names.index(example["query"])] for example in shown) == pytest.approx(
                sorted(values[names.index(wording)] for wording in distinct), rel=1e-6
            )
            for example in shown:
                rows_of = [row for row in range(len(names)) if names[row] == example["query"]]
                [row] = [row for row in rows_of if values[row] == pytest.approx(example["uncertainty"], rel=1e-9)][:1]
                top = np.argsort(-rows[row])[:5]
                assert [best["score"] for best in example["best"]] == pytest.approx(rows[row][top])
                assert [best["answer"] for best in example["best"]] == [answers[item] for item in top]
                assert [best["right"] for best in example["best"]] == [item in positives[row] for item in top]
                assert [best["true"] for best in example["best"]] == [bool(fits[row][item]) for item in top]
    assert result["rsum"] == pytest.approx(100 * sum(recalls))
    best = [np.mean(1 / count[group]) for group in np.array_split(np.argsort(np.log(count), kind="stable"), levels)]
    assert result["bayes_optimal"]["levels"] == pytest.approx(best)
    assert arrays["text_uncertainty"] == pytest.approx(uncertainties["text"])
    assert (arrays["text_to_image_top"] == scores.argmax(axis=0)).all()
    # A caption true of one image only was written for it: the limit of an image that has one is 1.
    limit, unique = arrays["image_to_text_limit"], np.unique(owner[count == 1])
    assert (limit[unique] == 1).all() and (limit > 0).all() and (limit[np.setdiff1d(owner, unique)] < 1).all()
    assert result["config"]["optim"]["name"] == "adamw" and result["variant"] == method
    assert result["checkpoint"] == run.weights_hash()


def test_chains_of_prompts_by_a_slow_script(trained, refusal):
    evaluation.main([*RUN, "--quiet", "--device", "cpu"])
    evaluation.main([*RUN, "--quiet", "--device", "cpu", "--task", "hierarchy"])
    folder = trained / RESULT.format("asymvlm-vmf")
    result = json.loads(folder.with_name("shapes-hierarchy.json").read_text())
    assert result["task"] == "hierarchy"
    assert result["hierarchy"] == json.loads(folder.with_name("shapes-retrieval.json").read_text())["hierarchy"]
    pairs = Pairs("shapes", "shapes-tiny", "val")
    adaptor, _, _ = Run(load_config("shapes", "asymvlm-vmf")).load("cpu")
    chain, depth, embeddings = (pairs.chains[name] for name in ("chain", "depth", "text"))
    with torch.inference_mode():
        of_prompts = adaptor.adapt_text(torch.tensor(embeddings).float()).uncertainty.double().numpy()
    uncertainties = {"query": of_prompts}
    uncertainties["long embedding"] = [np.sqrt(sum(float(x) ** 2 for x in row)) for row in embeddings]
    uncertainties["few words"] = [-len(prompt.split()) for prompt in pairs.items["prompt"]]
    assert result["hierarchy"]["uncertainty"].keys() == uncertainties.keys()
    for name, values in uncertainties.items():
        falls, within = [], []
        for number in range(100):
            rows = sorted(np.flatnonzero(chain == number), key=lambda row: depth[row])
            falls.append([values[b] < values[a] for a, b in itertools.pairwise(rows)])
            within.append(stats.spearmanr([values[row] for row in rows], range(len(rows))).statistic)
        figures = result["hierarchy"]["uncertainty"][name]
        assert figures["falling_chains"] == pytest.approx(np.mean([all(steps) for steps in falls]))
        assert figures["falling_steps"] == pytest.approx(np.mean(falls))
        assert figures["spearman_depth"] == pytest.approx(stats.spearmanr(values, depth).statistic)
        assert figures["spearman_depth_within_chains"] == pytest.approx(np.mean(within))
        for d in range(6):
            assert figures["mean_by_depth"][str(d)] == pytest.approx(np.mean(np.array(values)[depth == d]), rel=1e-6)
    message = refusal(evaluation.main, *RUN, "--task", "classification")
    assert "has captions and no classes: --task classification does not apply to it" in message


def test_the_reference_suites_levels(trained):
    """By a loop: images have the levels of the captions they retrieve, n // levels in each; the rest is left out."""
    chosen = ["--levels_by", "retrieved", "--drop_remainder", "--uncer_levels", "7"]
    train.main(["--dataset", "shapes", "--method", "pfe", "--quiet", "--set", "train.epochs=2", "model.width=32"])
    for method in ("asymvlm-vmf", "pfe"):  # PFE's images have an uncertainty, which levels follow by default
        run = ["--dataset", "shapes", "--method", method, "--quiet", "--device", "cpu"]
        levels = []
        for choices in (chosen, chosen[-2:]):
            evaluation.main([*run, *choices])
            path = trained / (RESULT.format(method) + ".json")
            part, arrays = json.loads(path.read_text())["image_to_text"], dict(np.load(path.with_suffix(".npz")))
            levels.append(part["uncertainty"][part["levels_by"]]["levels"])
        values = arrays["text_uncertainty"][arrays["image_to_text_top"]]
        order, size, expected = sorted(range(100), key=lambda row: values[row]), 100 // 7, []
        for level in range(7):
            # Several images may retrieve one caption: these are in random order.
            tied = [values == values[order[size * level + n]] for n in range(size)]
            expected.append(np.mean([arrays["image_to_text_hit"][rows].mean() for rows in tied]))
        assert levels[0]["recall"]["1"] == pytest.approx(expected) and levels[0]["count"] == [14] * 7
        assert levels[1]["recall"]["1"] != pytest.approx(expected) and sorted(levels[1]["count"]) == [14] * 5 + [15] * 2
        assert part["levels_by"] == ("query" if method == "pfe" else "retrieved")


def test_clip_has_recall_and_no_uncertainty(world, capsys):
    run = ["--dataset", "shapes", "--method", "clip"]
    train.main([*run, "--quiet"])
    assert "nothing to train" in capsys.readouterr().out
    evaluation.main(run)
    result = json.loads((world / (RESULT.format("clip") + ".json")).read_text())
    side = result["text_to_image"]
    free = {"words", "length", "top", "margin", "entropy", "probability"}
    assert side["levels_by"] is None and side["uncertainty"].keys() == free
    # Without an uncertainty of the method, the entropy over the gallery selects the examples.
    shown = [example["uncertainty"] for part in ("most_certain", "least_certain") for example in side["examples"][part]]
    assert shown[:10] == sorted(shown[:10]) and shown[10:] == sorted(shown[10:], reverse=True)
    pairs = Pairs("shapes", "shapes-tiny", "val")
    image, text = (np.array(x, dtype=np.float64) for x in (pairs.image, pairs.text))
    cosine = (text / np.linalg.norm(text, axis=1, keepdims=True)) @ (
        image / np.linalg.norm(image, axis=1, keepdims=True)
    ).T
    assert result["text_to_image"]["recall"]["1"] == pytest.approx(
        (cosine.argmax(1) == pairs.image_of_text).mean(), abs=0.005
    )


def test_what_does_not_fit_is_refused(trained, refusal, small_world):
    for levels in ("1", "0", "-2", "101"):
        assert "--uncer_levels must lie between 2 and 100" in refusal(evaluation.main, *RUN, "--uncer_levels", levels)
    assert "there is no checkpoint in" in refusal(evaluation.main, *RUN, "--seed", "5")
    assert "device 'cuda:9' does not exist" in refusal(evaluation.main, *RUN, "--device", "cuda:9")

    (trained / "embeddings").unlink()
    shutil.copytree(small_world / "embeddings", trained / "embeddings")
    folder = trained / "embeddings/shapes/shapes-tiny/val"
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"encoder_fingerprint": "0" * 16}))
    assert "was trained on another backbone than" in refusal(evaluation.main, *RUN)
    np.save(folder / "image.npy", np.zeros((100, 32), np.float16))
    np.save(folder / "text.npy", np.zeros((500, 32), np.float16))
    (folder / "meta.json").write_text(json.dumps(meta | {"dim": 32}))
    assert "embeddings of size 64, but" in refusal(evaluation.main, *RUN)
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "image.npy cannot be read (it holds float16 of shape (100, 32))" in refusal(evaluation.main, *RUN)
    (folder / "meta.json").unlink()
    assert "is missing: run" in refusal(evaluation.main, *RUN)
    (folder / "unfinished").mkdir()
    assert "is unfinished: run" in refusal(evaluation.main, *RUN)
    assert not (trained / "results").exists()


def test_an_uncertainty_that_the_method_lacks_is_refused(trained, refusal):
    message = refusal(evaluation.main, *RUN, "--levels_by", "sum")
    assert "--levels_by sum needs an uncertainty that the method lacks for images; it has retrieved." in message
    train.main(["--dataset", "shapes", "--method", "clip", "--quiet"])
    message = refusal(evaluation.main, *RUN[:3], "clip", "--levels_by", "query")
    assert "it has none." in message and not (trained / "results").exists()


def test_where_all_are_equally_uncertain_there_are_no_levels(trained, capsys, monkeypatch):
    class Constant(type(Run(load_config("shapes", "asymvlm-vmf")).load("cpu")[0])):
        def adapt_text(self, text):
            return super().adapt_text(text)._replace(uncertainty=torch.ones(len(text)))

    monkeypatch.setattr("models.asymvlm.AsymVLM", Constant)
    evaluation.main([*RUN, "--device", "cpu"])
    assert "all queries are equally uncertain: there are no levels" in capsys.readouterr().out
    side = json.loads((trained / (RESULT.format("asymvlm-vmf") + ".json")).read_text())["text_to_image"]
    assert side["uncertainty"]["query"]["constant"] and "levels" not in side["uncertainty"]["query"]
    assert side["uncertainty"]["query"]["auroc"] == 0.5 and "levels" in side["uncertainty"]["entropy"]


def test_embeddings_that_are_not_finite_are_refused(trained, refusal, small_world):
    (trained / "embeddings").unlink()
    shutil.copytree(small_world / "embeddings", trained / "embeddings")
    folder = trained / "embeddings/shapes/shapes-tiny/val"
    image = np.load(folder / "image.npy")
    np.save(folder / "image.npy", np.full_like(image, np.nan))
    assert "image.npy holds NaN or infinity in rows 0, 1, 2 and 97 more of 100" in refusal(evaluation.main, *RUN)
    for name in ("items.jsonl", "matches.npz", "chains.npz"):
        shutil.copytree(small_world / "embeddings", trained / "embeddings", dirs_exist_ok=True)
        (folder / name).write_bytes((folder / name).read_bytes()[:50])
        assert f"{name} cannot be read" in refusal(evaluation.main, *RUN)
        (folder / name).unlink()
        assert f"{name} cannot be read" in refusal(evaluation.main, *RUN)
    shutil.copytree(small_world / "embeddings", trained / "embeddings", dirs_exist_ok=True)
    for damaged in ("", "{", "[]", "{}", "null"):
        (folder / "meta.json").write_text(damaged)
        assert "meta.json is damaged" in refusal(evaluation.main, *RUN)
        assert "meta.json is damaged" in refusal(cache_embeddings.main, "--dataset", "shapes", "--set", *SMALL_WORLD)


def test_another_backbones_weights_are_noticed(trained, refusal, monkeypatch):
    """uncertainty.py encodes prompts itself, so it must notice that the backbone's weights file has changed."""
    copy = trained / "weights.safetensors"
    shutil.copy("embeddings/shapes/shapes-tiny/val/meta.json", copy)
    monkeypatch.setattr("utils.config.Encoder.weights_file", property(lambda self: copy))
    assert "differ from those that" in refusal(uncertainty.main, *RUN, "a photo")


def test_transfer_lies_under_what_it_was_trained_on(trained, monkeypatch, capsys):
    """Evaluate on another data set than the one trained on; here it is `shapes` with another seed."""
    import open_clip

    from utils import config as configuration

    home = trained / "home"
    shutil.copytree(configuration.HOME / "configs", home / "configs")
    text = (home / "configs/datasets/shapes.yaml").read_text().replace("seed: 0", "seed: 1")
    (home / "configs/datasets/other.yaml").write_text(text)
    for module in ("utils.config", "datasets.embeddings", "models.backbones.openclip"):
        monkeypatch.setattr(f"{module}.HOME", home)
    # A name can be added once; which test of this process comes first is open.
    open_clip.add_model_config(configuration.HOME / "configs/backbones/shapes-tiny.json")
    monkeypatch.setattr("models.backbones.openclip.open_clip.add_model_config", lambda path: None)
    (trained / "embeddings").unlink()
    for name in ("shapes", "other"):
        cache_embeddings.main(["--dataset", name, "--quiet", "--splits", "val", "--set", *SMALL_WORLD])
    evaluation.main(["--dataset", "other", "--train-dataset", "shapes", "--method", "asymvlm-vmf"])
    result = json.loads((trained / "results/shapes/shapes-tiny/asymvlm-vmf/seed0/other-retrieval.json").read_text())
    assert (result["evaluated_on"], result["config"]["dataset"]) == ("other", "shapes")


def test_uncertainty_of_prompts(trained, capsys, refusal, tmp_path):
    prompts = ["a photo", "a photo of a large red circle in the center on a black background", "a photo of a circle"]
    uncertainty.main([*RUN, *prompts])
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.rsplit("  ", 1)[0].strip() for line in lines] == prompts
    uncertainty.main([*RUN, "--json", *prompts])
    out = capsys.readouterr().out
    rows = json.loads(out)
    values = {row["item"]: row["uncertainty"] for row in rows}
    assert values[prompts[0]] > values[prompts[1]] and all(row["kind"] == "text" for row in rows)
    uncertainty.main([*RUN, "--json", "--sort", *prompts])
    ranked = [row["uncertainty"] for row in json.loads(capsys.readouterr().out)]
    assert ranked == sorted(values.values(), reverse=True)

    pairs = Pairs("shapes", "shapes-tiny", "val")
    evaluation.main([*RUN, "--quiet"])
    expected = np.load(RESULT.format("asymvlm-vmf") + ".npz")["text_uncertainty"]
    capsys.readouterr()
    uncertainty.main([*RUN, "--json", *pairs.items["text"][:5]])
    assert [row["uncertainty"] for row in json.loads(capsys.readouterr().out)] == pytest.approx(expected[:5], rel=1e-2)

    capsys.readouterr()
    uncertainty.main([*RUN, "a small red circle " * 20, "a photo"])
    printed = capsys.readouterr()
    assert "is longer than the backbone reads" in printed.err and printed.err.count("\n") == 1
    assert len(printed.out.splitlines()[-1]) < 100

    assert "a prompt is empty" in refusal(uncertainty.main, *RUN, "a photo", "  ")
    assert "asymvlm-vmf has no uncertainty for images" in refusal(uncertainty.main, *RUN, pairs.items["image"][0])
    assert "there is no image file nowhere.jpg" in refusal(uncertainty.main, *RUN, "nowhere.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    assert "broken.png cannot be read" in refusal(uncertainty.main, *RUN, str(tmp_path / "broken.png"))
    # What exists is no prompt, whatever it is called.
    shutil.copy(pairs.items["image"][0], tmp_path / "photo")
    assert "has no uncertainty for images ('photo')" in refusal(uncertainty.main, *RUN, "photo")
    (tmp_path / "table.csv").write_text("image,caption\n")
    for item in ("data", "table.csv", str(tmp_path / "table.csv")):
        assert f"{item} cannot be read as an image" in refusal(uncertainty.main, *RUN, item)


def test_a_folder_that_cannot_be_written_into_is_named_before_anything_is_computed(trained, refusal, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmp")

    monkeypatch.setattr("tasks.retrieval.evaluate", None)  # whoever computes ends with a TypeError
    shutil.rmtree("results", ignore_errors=True)
    Path("results").symlink_to("a disk that is not mounted")
    assert "results cannot be written into (No such file or directory): change that" in refusal(evaluation.main, *RUN)
    Path("results").unlink()
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "cannot be written into (Permission denied): change that, or work" in refusal(evaluation.main, *RUN)


def test_what_looks_like_a_path_is_no_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prompt in ("dog", "a photo of a dog", "and/or a dog", "U.S.", "a picture called dog.jpg", "x" * 5000, "a\0b"):
        assert not uncertainty.is_image(prompt), prompt
    for path in ("dog.jpg", "DOG.JPG", "dog.csv", "photos/dog", "/photos/a dog.png", "../dog", "https://a.b/dog.jpg"):
        assert uncertainty.is_image(path), path


def test_which_score_ranks_is_a_flag(trained, capsys):
    results = {}
    for score in ("log_likelihood", "similarity", "both"):
        evaluation.main([*RUN, "--score", score, "--device", "cpu"])
        results[score] = json.loads((trained / (RESULT.format("asymvlm-vmf") + ".json")).read_text())
    assert results["log_likelihood"]["score"] == results["both"]["score"] == "log_likelihood"
    assert results["similarity"]["score"] == results["similarity"]["config"]["score"] == "similarity"
    other = results["both"]["other_score"]
    for side in ("text_to_image", "image_to_text"):
        assert results["both"][side] == results["log_likelihood"][side]
        assert results["similarity"][side] == other[side] | {"examples": results["similarity"][side]["examples"]}
    assert other["posterior_scale"] == Pairs("shapes", "shapes-tiny", "val").meta["logit_scale"]
    # For one caption the density rises with the cosine; across captions it does not.
    assert other["text_to_image"]["recall"] == results["both"]["text_to_image"]["recall"]
    of_answers = [part["image_to_text"]["uncertainty"]["retrieved"]["auroc"] for part in (other, results["both"])]
    assert of_answers[0] != of_answers[1]


def test_repeated_captions_are_counted():
    """Captions that stand with another image, word for word; one that an image has twice is none."""
    pairs = SimpleNamespace(
        classes=None,
        items={"text": ["a cat", "a cat", "a dog", "two dogs", "a dog"]},
        image_of_text=np.array([0, 0, 0, 1, 1]),
    )
    assert evaluation.repeated(pairs) == 2
    assert evaluation.repeated(SimpleNamespace(classes=["cat"])) == 0


def test_images_of_one_scene_are_drawn_together():
    """Two drawings that the same captions are true of; without known matches every image is by itself."""
    matches = sparse.csr_array(np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0]]))
    pairs = SimpleNamespace(matches=matches, image=np.zeros((3, 2)))
    assert retrieval.scenes(pairs).tolist() == [0, 1, 0]
    assert retrieval.scenes(SimpleNamespace(matches=None, image=pairs.image)).tolist() == [0, 1, 2]


def test_which_split_is_evaluated_is_a_flag(trained):
    """Each split has a separate result."""
    evaluation.main([*RUN, "--device", "cpu", "--quiet"])
    result = trained / (RESULT.format("asymvlm-vmf") + ".json")
    before = result.read_bytes()
    evaluation.main([*RUN, "--split", "train", "--allow-leakage", "--device", "cpu", "--quiet"])
    written = json.loads(result.with_name("shapes+train-retrieval.json").read_text())
    assert (written["split"], written["images"], written["seen_in_training"]) == ("train", 300, 300)
    assert result.read_bytes() == before


def test_images_trained_on_are_not_evaluated_on_unasked(world, refusal):
    train.main([*RUN, "--quiet", "--device", "cpu", "--set", "train.epochs=1", "data.train_split=val"])
    for split in ([], ["--split", "val"]):
        message = refusal(evaluation.main, *RUN, "--device", "cpu", *split)
        assert "was trained on 100 of the 100 images of shapes 'val'" in message
        assert "images of shapes 'val': name another --split or --train-dataset" in message
    assert not (world / (RESULT.format("asymvlm-vmf") + ".json")).exists()
    evaluation.main([*RUN, "--device", "cpu", "--allow-leakage", "--quiet"])
    result = json.loads((world / (RESULT.format("asymvlm-vmf") + ".json")).read_text())
    assert result["seen_in_training"] == 100


def test_images_with_an_uncertainty_are_judged_by_their_own(world):
    run = ["--dataset", "shapes", "--method", "pfe", "--device", "cpu", "--quiet"]
    train.main([*run, "--set", "train.epochs=2", "model.width=32"])
    evaluation.main(run)
    result = world / (RESULT.format("pfe") + ".json")
    chosen = {}
    for by in (None, "query", "retrieved", "sum"):
        evaluation.main([*run, *(["--levels_by", by] if by else [])])
        written, arrays = json.loads(result.read_text()), np.load(result.with_suffix(".npz"))
        assert written["levels_by"] == by and written["image_to_text"]["levels_by"] == (by or "query")
        chosen[by] = arrays["image_to_text_uncertainty"]
    image, text = arrays["image_uncertainty"], arrays["text_uncertainty"][arrays["image_to_text_top"]]
    expected = {None: image, "query": image, "retrieved": text, "sum": image + text}
    assert all((chosen[by] == values).all() for by, values in expected.items())


def test_the_posterior_of_clip_has_the_logit_scale_of_its_model_or_the_calibrated_one(world):
    scale = Pairs("shapes", "shapes-tiny", "val").meta["logit_scale"]
    for fraction, tag in (("0", "own"), ("0.2", "calibrated")):
        run = ["--dataset", "shapes", "--method", "clip", "--tag", tag, "--device", "cpu", "--quiet"]
        train.main([*run, "--val-fraction", fraction])
        evaluation.main(run)
        fitted = json.loads((world / (RESULT.format(f"clip+{tag}") + ".json")).read_text())["posterior_scale"]
        # The backbone's scale from training suits its embeddings, so that calibration stays near it.
        assert fitted == pytest.approx(scale, rel=1e-5) if tag == "own" else scale / 3 < fitted < 3 * scale != fitted


def test_drawn_objects_are_classified_by_an_adaptor_trained_on_captions(trained, refusal, capsys, monkeypatch):
    """Zero-shot: a folder per shape, cached with the same backbone, evaluated with an adaptor trained on captions."""
    write_classes(trained / "drawn")
    names = ["--dataset", "folder", "--backbone", "shapes-tiny", "--device", "cpu"]
    shares = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 100)  # of human answers
    monkeypatch.setattr(Classification, "_shares", lambda self, images, classes: shares)
    cache_embeddings.main([*names, "--root", "drawn", "--quiet"])
    assert "100 images, 6 prompts for 6 classes" in capsys.readouterr().out
    message = refusal(train.main, *names, "--method", "pfe", "--set", "data.train_split=all")
    assert "holds images with classes, not captions" in message
    evaluation.main([*names, "--train-dataset", "shapes", "--method", "asymvlm-vmf"])
    printed = capsys.readouterr().out
    result = json.loads(
        (trained / "results/shapes/shapes-tiny/asymvlm-vmf/seed0/folder-classification.json").read_text()
    )
    assert result["image_to_class"]["recall"]["1"] > 0.6 and "image->class  top-1" in printed  # chance level: 0.17
    assert result["image_to_class"]["levels_by"] == "retrieved" and result["seen_in_training"] == 0
    # Recompute every figure: images are scored with the average prompt of each class.
    pairs, adaptor = Pairs("folder", "shapes-tiny", "all"), Run(load_config("shapes", "asymvlm-vmf")).load("cpu")[0]
    with torch.inference_mode():
        text = adaptor.adapt_text(torch.tensor(np.array(pairs.text)).float())  # one template: no average
        scores = adaptor.log_likelihood(adaptor.adapt_image(torch.tensor(np.array(pairs.image)).float()), text).numpy()
    part, positives = result["image_to_class"], [[label] for label in pairs.label]
    hits = {k: slow(scores, positives, k) for k in (1, 5, 10)}
    assert part["recall"] == {str(k): pytest.approx(hit.mean()) for k, hit in hits.items()}
    truth = np.array([stats.entropy(row) for row in shares])
    values = text.uncertainty.double().numpy()[scores.argmax(axis=1)]
    agrees(part["uncertainty"]["retrieved"], slow_uncertainty(values, hits, 10, None, truth))
    posterior = torch.tensor(scores).double().mul(adaptor.posterior_scale).softmax(dim=1).numpy()
    expected = slow_calibration(posterior, positives, [adaptor.posterior_scale], np.arange(6))
    values = stats.entropy(posterior, axis=1)
    slowly = slow_uncertainty(values, hits, 10, None, None)
    expected |= {"accuracy": hits[1].mean(), "auroc": slowly["auroc"], "aurc": slowly["aurc"]}
    agrees(part["calibration"]["model"], expected)
    entropy = np.load(trained / "results/shapes/shapes-tiny/asymvlm-vmf/seed0/folder-classification.npz")
    expected = stats.spearmanr(entropy["image_to_class_entropy"], [stats.entropy(row) for row in shares]).statistic
    assert result["image_to_class"]["uncertainty"]["entropy"]["spearman"] == pytest.approx(expected)
    [best] = [example["best"] for example in result["image_to_class"]["examples"]["most_certain"]][:1]
    assert len(best) == 5 and {answer["answer"] for answer in best} < set(VALUES[0])
