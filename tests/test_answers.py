"""Searches of uncertainty.py --gallery: answers by the definitions, unseen words, refusals; decisions in the report."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from check_method import CHANGES, change_part
from decided import LEARNED, SEARCH
from scipy import special, stats

import uncertainty
from tasks import answers
from utils.config import contract_of, load_config, make_adaptor


def test_answers_from_files(searched, capsys):
    """What a search prints for captions of the gallery itself, by the definitions, on the scores of all pairs."""
    from datasets.embeddings import Pairs

    pairs = Pairs("shapes", "shapes-tiny", "val")
    texts = [pairs.items["text"][row] for row in (3, 40, 41)]
    uncertainty.main(
        [*SEARCH, "--json", "--html", "page.html", "--unanswerable", "0.2", *texts, pairs.items["image"][7]]
    )
    rows = json.loads(capsys.readouterr().out)
    sets, rejection = (json.loads(Path(LEARNED.format(t)).read_text()) for t in ("conformal", "unanswerable"))
    image, text = (np.array(x, dtype=np.float64) for x in (pairs.image, pairs.text))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    cosine = unit[1] @ unit[0].T
    for row, scores in zip(rows, (*cosine[[3, 40, 41]], unit[0][7] @ unit[1].T), strict=True):
        side = "text_to_image" if row["kind"] == "text" else "image_to_text"
        names = pairs.items["image" if row["kind"] == "text" else "text"]
        fitted, models = sets[side]["fitted"], rejection[side]["fitted"]
        p = special.softmax(fitted["scale"] * scores)
        assert row["best"][0]["probability"] == pytest.approx(p.max(), rel=0.05)
        assert scores[names.index(row["best"][0]["answer"])] >= scores.max() - 2e-3
        level = np.searchsorted(fitted["edges"], stats.entropy(p), side="right")
        limit = fitted["thresholds"]["lac"]["0.1"]["levels"][level]
        assert row["set_size"] == pytest.approx((1 - p <= limit).sum(), abs=2)
        first, second = -np.sort(-scores)[:2]
        energy = -special.logsumexp(fitted["scale"] * scores) / fitted["scale"]
        features = np.array([-first, second - first, energy, stats.entropy(p), -np.log(p.max())])
        answer, right = (
            special.expit(features @ models[k]["weight"] + models[k]["intercept"]) for k in ("answer", "right")
        )
        answer = 0.8 * answer / (0.8 * answer + 0.2 * (1 - answer))  # from one without an answer in two to one in five
        assert row["nothing_fits"] == pytest.approx(1 - answer, abs=0.03)
        assert row["right"] == pytest.approx(answer * right, abs=0.03)
    page = Path("page.html").read_text()
    assert page.count("<section>") == 4 and "data:image/" in page and "http" not in page.replace("http-equiv", "")
    uncertainty.main([*SEARCH, texts[0]])
    printed = capsys.readouterr().out
    assert "the first answer is right: " in printed and "nothing fits: " in printed


def test_words_that_nothing_was_learned_from_are_named(searched, capsys):
    prompts = ["a photo of a Dog, a red DOG on a teapot", "a photo of a red circle", "?!"]
    uncertainty.main([*SEARCH, *prompts])
    assert "no caption that taught this has the word dog, teapot: it need not hold" in capsys.readouterr().out
    uncertainty.main([*SEARCH, "--json", "--html", "page.html", *prompts])
    assert [row["unseen_words"] for row in json.loads(capsys.readouterr().out)] == [["dog", "teapot"], [], ["?!"]]
    assert Path("page.html").read_text().count("has the word dog, teapot: it need not hold here.") == 1


def test_what_cannot_be_searched_is_refused(searched, refusal, monkeypatch):
    assert "--html is for the answers of a --gallery" in refusal(
        uncertainty.main, *SEARCH[:-2], "--html", "a", "a photo"
    )
    assert "--html . is a folder" in refusal(uncertainty.main, *SEARCH, "--html", ".", "a photo")
    for flag, value in (("--learned-on", "val"), ("--alpha", "0.1"), ("--unanswerable", "0.1")):
        message = refusal(uncertainty.main, *SEARCH[:-2], flag, value, "a photo")
        assert f"{flag} is for the answers of a --gallery" in message
    assert "not 10: it is a share, not a percentage" in refusal(uncertainty.main, *SEARCH, "--alpha", "10", "a photo")
    assert "is a link: download the image" in refusal(uncertainty.main, *SEARCH, "https://example.com/cat.jpg")
    assert "--alpha 0.3 is none of 0.05, 0.1, 0.2" in refusal(uncertainty.main, *SEARCH, "--alpha", "0.3", "a photo")
    assert "--unanswerable must lie" in refusal(uncertainty.main, *SEARCH, "--unanswerable", "1", "a photo")
    assert "is missing: run" in refusal(uncertainty.main, *SEARCH[:-1], "test", "a photo")
    with monkeypatch.context() as patch:
        patch.setattr(uncertainty, "encode", lambda kind, items, *_: torch.full((len(items), 64), torch.nan))
        message = refusal(uncertainty.main, *SEARCH, "a photo")
        assert "clip/seed0 on embeddings/shapes/shapes-tiny/val: a score is not finite." in message
    message = refusal(uncertainty.main, *SEARCH, "--learned-on", "test", "a photo")
    assert (
        "shapes+test-conformal.json is missing, from which to answer: run `python eval.py --dataset shapes" in message
    )
    path = Path(LEARNED.format("conformal"))
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"checkpoint": "0"}))
    assert "is of other weights than" in refusal(uncertainty.main, *SEARCH, "a photo")
    path.write_text(json.dumps(values)[:-9])
    assert "is damaged: delete it and run" in refusal(uncertainty.main, *SEARCH, "a photo")


def test_decisions_have_parts_in_the_report(searched):
    """Each cell of the tables as it stands in the results; each figure has something to draw."""
    import report
    from reporting.figures import style

    values = {
        task: json.loads(Path(LEARNED.format(task)).read_text()) for task in ("matching", "conformal", "unanswerable")
    }
    parts = report.evaluations.read(Path("results/shapes"))
    assert [part.task for part in parts] == list(values)
    tables = {table.name: table for part in parts for table in part.tables}
    assert tables.keys() == {"matching", "thresholds", "conformal", "unanswerable"}
    cells = {row.name: row.cells for name in tables for _, rows in tables[name].groups for row in rows}
    side = {task: result["text_to_image"] for task, result in values.items()}
    posterior = side["matching"]["matching"]["posterior"]
    assert cells["clip, posterior by isotonic"]["text_to_image_ece"].mean == posterior["isotonic"]["ece"]
    row = posterior["thresholds"][2]["measured"]
    assert cells["clip, posterior, 90 %"]["text_to_image_recall"].mean == pytest.approx(100 * row["recall"])
    record = side["conformal"]["conformal"]["aps"]["0.1"]
    assert cells["clip, APS"]["text_to_image_0.1_coverage"].mean == pytest.approx(100 * record["coverage"])
    worst = min(level["coverage"] for level in record["levels"])
    assert cells["clip, APS"]["text_to_image_0.1_levels"].mean == pytest.approx(100 * worst)
    record = side["unanswerable"]["rejection"]["energy"]
    assert cells["clip, energy"]["text_to_image_auroc"].mean == record["auroc"]
    looks = style.looks(parts)
    for part in parts:
        for drawing in style.drawings(part):
            for width in (style.WIDE, 3.6):
                assert len(drawing.draw(part, looks, width).findobj()) > 50


@pytest.mark.parametrize(
    "method, score, keeps",
    [
        ("pcmepp", "log_likelihood", {"image", "text"}),
        ("pfe", "log_likelihood", {"image", "text"}),
        ("symmetric-vmf", "log_likelihood", {"image", "text"}),
        ("asymvlm-psd", "log_likelihood", {"text"}),
        ("loss-prediction", "log_likelihood", set()),
        ("clip", "log_likelihood", set()),
        ("probvlm", "similarity", set()),
        ("probvlm", "log_likelihood", None),
    ],
)
def test_a_search_adapts_items_once_at_most(method, score, keeps, tmp_path, monkeypatch):
    """What a method knows of each item is kept: the same scores from one product; of other weights it is not read.

    Nor is it of other code, for which other numbers stand here; and nothing is kept of what is not finite. keeps: the
    sides of which there is something to keep; None for a score that is no function of a cosine.
    """
    rows, cpu = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float16), torch.device("cpu")
    pairs = SimpleNamespace(fed=lambda side, pooled: rows)
    for kind, other in (("text", "image"), ("image", "text")):
        adaptor = make_adaptor(load_config("embeddings", method), 16).eval()
        adapt = {side: getattr(adaptor, f"adapt_{side}") for side in ("image", "text")}

        def scores(query, kept, adaptor=adaptor, other=other):
            return answers.Gallery(adaptor, pairs, other, score, cpu).scores(query, kept)

        def wanted(query, adaptor=adaptor, kind=kind, of=adapt[other]):
            with torch.inference_mode():
                items = of(torch.from_numpy(rows).float())
                both = (query, items) if kind == "image" else (items, query)
                values = getattr(adaptor, score)(*both)
            return values if kind == "image" else values.T

        with torch.inference_mode():
            query = adapt[kind](torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
        adapted = []

        def spy(items, of=adapt[other], adapted=adapted):
            adapted.append(len(items))
            return of(items)

        monkeypatch.setattr(adaptor, f"adapt_{other}", spy)
        place = tmp_path / f"{kind}.npz"
        counts = []
        for of in ("weights", "weights", "others"):
            assert torch.allclose(scores(query, (place, of)), wanted(query), rtol=1e-5, atol=1e-5)
            counts.append(sum(adapted))
            adapted.clear()
        # The first items are adapted twice: for the terms, and for the form of the score.
        whole = 8 + 50 if keeps is None else 8 + 50 + 8
        assert counts == [whole, 16 if keeps is not None else whole, whole]
        assert place.exists() == (keeps is not None)
        if place.exists():
            assert (len(np.load(place).files) > 1) == (other in keeps)
        for name, change in contract_of(method, "default").get("wider", {}).items():
            change_part(adaptor, name, CHANGES[change])
        assert torch.allclose(scores(query, (place, "others")), wanted(query), rtol=1e-5, atol=1e-5)
        broken = query._replace(mean=query.mean * torch.nan)
        with pytest.raises(FloatingPointError, match="a score is not finite"):
            scores(broken, None)
        for parameter in adaptor.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
        if keeps and other in keeps:
            with pytest.raises(FloatingPointError, match="a score is not finite"):
                scores(query, (tmp_path / "none.npz", "a"))
        assert not (tmp_path / "none.npz").exists()


def test_a_method_that_moves_one_item_is_scored_as_it_says(tmp_path):
    """The last of 50, which is none of those by which the form of the score is learned."""
    rows, cpu = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float16), torch.device("cpu")
    rows[-1, 0] = 9
    adaptor = make_adaptor(load_config("embeddings", "clip"), 16).eval()
    adapt = adaptor.adapt_image
    adaptor.adapt_image = lambda image: adapt(torch.where(image[:, :1] > 8, -image, image))
    pairs, query = SimpleNamespace(fed=lambda side, pooled: rows), adaptor.adapt_text(torch.ones(1, 16))
    gallery = answers.Gallery(adaptor, pairs, "image", "similarity", cpu)
    for _ in range(2):
        scores = gallery.scores(query, (tmp_path / "kept.npz", "weights"))
        wanted = adaptor.similarity(adaptor.adapt_image(torch.from_numpy(rows).float()), query)
        torch.testing.assert_close(scores, wanted.T)


def test_eval_keeps_what_a_search_needs(searched, monkeypatch):
    """After `eval.py --task conformal`, even the first search of a trained method adapts no more than a few items."""
    import eval as evaluation
    import train
    from models.pcmepp import PCMEPP

    run = [*SEARCH[:2], "--method", "pcmepp", "--device", "cpu"]
    train.main([*run, "--quiet", "--set", "train.epochs=1"])
    for task in ("conformal", "unanswerable"):
        evaluation.main([*run, "--quiet", "--split", "val", "--task", task])
    adapted = []

    def spy(self, items, of=PCMEPP.adapt_image):
        adapted.append(len(items))
        return of(self, items)

    monkeypatch.setattr(PCMEPP, "adapt_image", spy)
    uncertainty.main([*run, "--gallery", "val", "a photo of a red circle"])
    assert adapted == [8, 8]
