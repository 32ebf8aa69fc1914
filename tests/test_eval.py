"""Evaluation: every figure of a result file recomputed slowly, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_WORLD
from scipy import stats

import cache_embeddings
import eval as evaluation
import train
import uncertainty
from datasets.classification import Classification
from datasets.embeddings import Pairs
from datasets.shapes import VALUES, Shapes
from utils.checkpoint import Run
from utils.config import load_config

RUN = ["--dataset", "shapes", "--method", "asymvlm-vmf"]
RESULT = "results/shapes/shapes-tiny/{}/seed0/shapes-retrieval"


@pytest.fixture
def trained(world):
    short = ["--val-fraction", "0", "--set", "train.epochs=6", "train.batch_size=128"]
    train.main([*RUN, "--quiet", "--device", "cpu", *short])
    return world


def slow(scores, own, k):
    """Chance that an own item is among the k best of each row if tied items stand in random order, by a loop."""
    hits = []
    for row, items in zip(scores, own, strict=True):
        best = row[items].max()
        others = np.delete(row, items)
        better, tied, mine = (others > best).sum(), (others == best).sum(), (row[items] == best).sum()
        places = min(max(k - better, 0), tied + mine)
        hits.append(1 - stats.hypergeom(tied + mine, mine, places).pmf(0))
    return np.array(hits)


@pytest.mark.parametrize("levels", [10, 7])
def test_every_figure_by_a_slow_script(trained, levels):
    evaluation.main([*RUN, "--uncer_levels", str(levels), "--device", "cpu"])
    found = json.loads((trained / (RESULT.format("asymvlm-vmf") + ".json")).read_text())
    arrays = np.load(trained / (RESULT.format("asymvlm-vmf") + ".npz"))
    pairs = Pairs("shapes", "shapes-tiny", "val")
    adaptor, _, _ = Run(load_config("shapes", "asymvlm-vmf")).load("cpu")
    with torch.inference_mode():
        image = adaptor.adapt_image(torch.tensor(np.array(pairs.image)).float())
        text = adaptor.adapt_text(torch.tensor(np.array(pairs.text)).float())
        scores = adaptor.log_likelihood(image, text).numpy()
    doubt = text.uncertainty.double().numpy()
    count = pairs.matches.toarray().sum(axis=0)
    owner = pairs.image_of_text
    own_texts = [np.flatnonzero(owner == i) for i in range(len(pairs.image))]
    sides = {
        "text_to_image": (scores.T, [[i] for i in owner], doubt),
        "image_to_text": (scores, own_texts, doubt[scores.argmax(axis=1)]),
    }
    for side, (rows, own, side_doubt) in sides.items():
        hits = {k: slow(rows, own, k) for k in (1, 5, 10)}
        part = found[side]
        for k in hits:
            assert part["recall"][str(k)] == pytest.approx(hits[k].mean())
        groups = np.array_split(np.argsort(side_doubt, kind="stable"), levels)
        assert [level["count"] for level in part["levels"]] == [len(group) for group in groups]
        recalls = np.array([level["recall"]["1"] for level in part["levels"]])
        assert recalls == pytest.approx([hits[1][group].mean() for group in groups])
        assert part["s"] == pytest.approx(stats.spearmanr(range(levels), recalls).statistic)
        assert part["r2"] == pytest.approx(stats.linregress(range(levels), recalls).rvalue ** 2)
        assert part["minus_s_r2"] == pytest.approx(-part["s"] * part["r2"])
        for level, group in zip(part["levels"], groups, strict=True):
            assert level["uncertainty"] == pytest.approx([side_doubt[group].min(), side_doubt[group].max()])
        wrong, right = side_doubt[hits[1] == 0], side_doubt[hits[1] == 1]
        auroc = stats.mannwhitneyu(wrong, right).statistic / len(wrong) / len(right)
        assert part["auroc"] == pytest.approx(auroc)
        best, second = -np.sort(-rows, axis=1)[:, :2].T
        posterior = torch.tensor(adaptor.posterior_scale * rows).double().softmax(dim=1).numpy()
        doubts = {"top": -best, "margin": second - best, "probability": -posterior.max(axis=1)}
        for name, value in (doubts | {"entropy": stats.entropy(posterior, axis=1)}).items():
            auroc = stats.mannwhitneyu(value[hits[1] == 0], value[hits[1] == 1]).statistic / len(wrong) / len(right)
            assert part["gallery_aware"][name] == pytest.approx(auroc, abs=1e-4)
    part = found["text_to_image"]
    assert part["bayes_recall"] == pytest.approx(np.mean(1 / count))
    assert part["spearman_ambiguity"] == pytest.approx(stats.spearmanr(doubt, np.log(count)).statistic)
    for level, group in zip(part["levels"], np.array_split(np.argsort(doubt, kind="stable"), levels), strict=True):
        assert level["bayes_recall"] == pytest.approx(np.mean(1 / count[group]))
    best = [np.mean(1 / count[group]) for group in np.array_split(np.argsort(np.log(count), kind="stable"), levels)]
    assert found["bayes_optimal"]["levels"] == pytest.approx(best)
    assert arrays["text_uncertainty"] == pytest.approx(doubt)
    assert (arrays["text_to_image_top"] == scores.argmax(axis=0)).all()
    assert found["config"]["optim"]["name"] == "adamw" and found["variant"] == "asymvlm-vmf"
    text_of = {text: row for row, text in enumerate(pairs.items["text"])}
    for name, order in (("most_certain", np.argsort(doubt)), ("least_certain", np.argsort(-doubt))):
        shown = found["examples"][name]
        expected = list(dict.fromkeys(pairs.items["text"][row] for row in order))[:10]
        assert [doubt[text_of[example["caption"]]] for example in shown] == pytest.approx(
            [doubt[text_of[text]] for text in expected]
        )
        assert all(example["fits"] == count[text_of[example["caption"]]] for example in shown)
    # A caption true of one image only is surely its own: the limit of an image that has one is 1.
    limit = arrays["image_limit"]
    unique = np.unique(owner[count == 1])
    assert (limit[unique] == 1).all() and (limit > 0).all() and (limit[np.setdiff1d(owner, unique)] < 1).all()
    assert found["image_to_text"]["bayes_recall"] == pytest.approx(limit.mean())
    chain, depth = pairs.chains["chain"], pairs.chains["depth"]
    with torch.inference_mode():
        prompt = adaptor.adapt_text(torch.tensor(pairs.chains["text"]).float()).uncertainty.numpy()
    falls = [np.diff(prompt[chain == c][np.argsort(depth[chain == c])]) < 0 for c in range(100)]
    assert found["prompt_chains"]["falling_chains"] == pytest.approx(np.mean([fall.all() for fall in falls]))
    assert found["checkpoint"] == Run(load_config("shapes", "asymvlm-vmf")).weights_hash()


def test_clip_has_recall_and_no_uncertainty(world, capsys):
    run = ["--dataset", "shapes", "--method", "clip"]
    train.main([*run, "--quiet"])
    assert "nothing to train" in capsys.readouterr().out
    evaluation.main(run)
    found = json.loads((world / (RESULT.format("clip") + ".json")).read_text())
    assert "levels" not in found["text_to_image"] and "examples" not in found
    pairs = Pairs("shapes", "shapes-tiny", "val")
    image, text = (np.array(x, dtype=np.float64) for x in (pairs.image, pairs.text))
    cosine = (text / np.linalg.norm(text, axis=1, keepdims=True)) @ (
        image / np.linalg.norm(image, axis=1, keepdims=True)
    ).T
    assert found["text_to_image"]["recall"]["1"] == pytest.approx(
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
    assert "other sizes than its meta.json says" in refusal(evaluation.main, *RUN)
    (folder / "meta.json").unlink()
    assert "is missing: run" in refusal(evaluation.main, *RUN)
    (folder / "unfinished").mkdir()
    assert "is unfinished: run" in refusal(evaluation.main, *RUN)
    assert not (trained / "results").exists()


def test_embeddings_that_are_not_finite_are_refused(trained, refusal, small_world):
    (trained / "embeddings").unlink()
    shutil.copytree(small_world / "embeddings", trained / "embeddings")
    folder = trained / "embeddings/shapes/shapes-tiny/val"
    image = np.load(folder / "image.npy")
    np.save(folder / "image.npy", np.full_like(image, np.nan))
    assert "a score is not finite" in refusal(evaluation.main, *RUN)
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
    """uncertainty.py encodes anew, so it must notice that the backbone's weights file is another one by now."""
    copy = trained / "weights.safetensors"
    shutil.copy("embeddings/shapes/shapes-tiny/val/meta.json", copy)
    monkeypatch.setattr("utils.config.Encoder.weights_file", property(lambda self: copy))
    assert "are not those that" in refusal(uncertainty.main, *RUN, "a photo")


def test_transfer_lies_under_what_it_was_trained_on(trained, monkeypatch, capsys):
    """Evaluate on another data set than was trained on; its cache here is another draw of the same world."""
    from utils import config as configuration

    home = trained / "home"
    shutil.copytree(configuration.HOME / "configs", home / "configs")
    text = (home / "configs/datasets/shapes.yaml").read_text().replace("seed: 0", "seed: 1")
    (home / "configs/datasets/other.yaml").write_text(text)
    for module in ("utils.config", "datasets.embeddings", "models.backbone"):
        monkeypatch.setattr(f"{module}.HOME", home)
    monkeypatch.setattr("models.backbone.open_clip.add_model_config", lambda path: None)  # known already, by its name
    (trained / "embeddings").unlink()
    for name in ("shapes", "other"):
        cache_embeddings.main(["--dataset", name, "--quiet", "--splits", "val", "--set", *SMALL_WORLD])
    evaluation.main(["--dataset", "other", "--train-dataset", "shapes", "--method", "asymvlm-vmf"])
    found = json.loads((trained / "results/shapes/shapes-tiny/asymvlm-vmf/seed0/other-retrieval.json").read_text())
    assert (found["evaluated_on"], found["config"]["dataset"]) == ("other", "shapes")


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
    doubt = np.load(RESULT.format("asymvlm-vmf") + ".npz")["text_uncertainty"]
    capsys.readouterr()
    uncertainty.main([*RUN, "--json", *pairs.items["text"][:5]])
    assert [row["uncertainty"] for row in json.loads(capsys.readouterr().out)] == pytest.approx(doubt[:5], rel=1e-2)

    capsys.readouterr()
    uncertainty.main([*RUN, "a small red circle " * 20, "a photo"])
    said = capsys.readouterr()
    assert "is longer than the backbone reads" in said.err and said.err.count("\n") == 1
    assert len(said.out.splitlines()[-1]) < 100

    assert "a prompt is empty" in refusal(uncertainty.main, *RUN, "a photo", "  ")
    assert "asymvlm-vmf knows no uncertainty of images" in refusal(uncertainty.main, *RUN, pairs.items["image"][0])
    assert "there is no image file nowhere.jpg" in refusal(uncertainty.main, *RUN, "nowhere.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    assert "broken.png cannot be read" in refusal(uncertainty.main, *RUN, str(tmp_path / "broken.png"))


def test_which_score_ranks_is_a_flag(trained, capsys):
    found = {}
    for score in ("log_likelihood", "similarity", "both"):
        evaluation.main([*RUN, "--score", score, "--device", "cpu"])
        found[score] = json.loads((trained / (RESULT.format("asymvlm-vmf") + ".json")).read_text())
    assert found["log_likelihood"]["score"] == found["both"]["score"] == "log_likelihood"
    assert found["similarity"]["score"] == found["similarity"]["config"]["score"] == "similarity"
    other = found["both"]["other_score"]
    for side in ("text_to_image", "image_to_text"):
        assert found["both"][side] == found["log_likelihood"][side]
        for name in ("recall", "gallery_aware"):
            assert other[side][name] == found["similarity"][side][name]
    assert other["posterior_scale"] == Pairs("shapes", "shapes-tiny", "val").meta["logit_scale"]
    # Within a caption's row the density rises with the cosine; across captions it does not.
    assert other["text_to_image"]["recall"] == found["both"]["text_to_image"]["recall"]
    assert other["image_to_text"]["recall"] != found["both"]["image_to_text"]["recall"]


def test_which_split_is_evaluated_is_a_flag(trained):
    """Each split has a result of its own."""
    evaluation.main([*RUN, "--device", "cpu", "--quiet"])
    result = trained / (RESULT.format("asymvlm-vmf") + ".json")
    before = result.read_bytes()
    evaluation.main([*RUN, "--split", "train", "--allow-leakage", "--device", "cpu", "--quiet"])
    found = json.loads(result.with_name("shapes+train-retrieval.json").read_text())
    assert (found["split"], found["images"], found["seen_in_training"]) == ("train", 300, 300)
    assert result.read_bytes() == before


def test_images_trained_on_are_not_evaluated_on_unasked(world, refusal):
    train.main([*RUN, "--quiet", "--device", "cpu", "--set", "train.epochs=1", "data.train_split=val"])
    for split in ([], ["--split", "val"]):
        said = refusal(evaluation.main, *RUN, "--device", "cpu", *split)
        assert "was trained on 100 of the 100 images of shapes 'val': name another --split or --train-dataset" in said
    assert not (world / (RESULT.format("asymvlm-vmf") + ".json")).exists()
    evaluation.main([*RUN, "--device", "cpu", "--allow-leakage", "--quiet"])
    found = json.loads((world / (RESULT.format("asymvlm-vmf") + ".json")).read_text())
    assert found["seen_in_training"] == 100


def test_images_with_an_uncertainty_are_judged_by_their_own(world):
    run = ["--dataset", "shapes", "--method", "pfe", "--device", "cpu", "--quiet"]
    train.main([*run, "--set", "train.epochs=2", "model.width=32"])
    evaluation.main(run)
    result = world / (RESULT.format("pfe") + ".json")
    found, arrays = json.loads(result.read_text())["image_to_text"], np.load(result.with_suffix(".npz"))
    assert found["levels_by"] == "query image"
    doubt, limit = arrays["image_uncertainty"], arrays["image_limit"]
    for level, rows in zip(found["levels"], np.array_split(np.argsort(doubt, kind="stable"), 10), strict=True):
        assert level["uncertainty"] == pytest.approx([doubt[rows].min(), doubt[rows].max()])
        assert level["bayes_recall"] == pytest.approx(limit[rows].mean())


def test_the_posterior_of_clip_has_the_logit_scale_of_its_model_or_the_calibrated_one(world):
    scale = Pairs("shapes", "shapes-tiny", "val").meta["logit_scale"]
    for fraction, tag in (("0", "own"), ("0.2", "calibrated")):
        run = ["--dataset", "shapes", "--method", "clip", "--tag", tag, "--device", "cpu", "--quiet"]
        train.main([*run, "--val-fraction", fraction])
        evaluation.main(run)
        found = json.loads((world / (RESULT.format(f"clip+{tag}") + ".json")).read_text())["posterior_scale"]
        # What the backbone was trained with suits its embeddings, so that calibration stays near it.
        assert found == pytest.approx(scale, rel=1e-5) if tag == "own" else scale / 3 < found < 3 * scale != found


def test_drawn_objects_are_classified_by_an_adaptor_trained_on_captions(trained, refusal, capsys, monkeypatch):
    """Zero-shot: a folder per shape, cached with the same backbone, evaluated with what was trained on captions."""
    source = Shapes("data/shapes", train_images=300, val_images=100)
    for image, scene in zip(source.images("val"), source.scenes("val"), strict=True):
        folder = trained / "drawn" / VALUES[0][scene[0]]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image.path, folder)
    names = ["--dataset", "folder", "--backbone", "shapes-tiny", "--device", "cpu"]
    shares = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 100)  # as if people had been asked
    monkeypatch.setattr(Classification, "_shares", lambda self, images, classes: shares)
    cache_embeddings.main([*names, "--root", "drawn", "--quiet"])
    assert "100 images, 6 prompts for 6 classes" in capsys.readouterr().out
    said = refusal(train.main, *names, "--method", "clip", "--set", "data.train_split=all")
    assert "holds images with classes, not captions" in said
    evaluation.main([*names, "--train-dataset", "shapes", "--method", "asymvlm-vmf"])
    said = capsys.readouterr().out
    found = json.loads(
        (trained / "results/shapes/shapes-tiny/asymvlm-vmf/seed0/folder-classification.json").read_text()
    )
    assert found["image_to_class"]["recall"]["1"] > 0.6 and "top-1" in said  # a guess: 0.17
    assert found["image_to_class"]["levels_by"] == "predicted class" and found["seen_in_training"] == 0
    entropy = np.load(trained / "results/shapes/shapes-tiny/asymvlm-vmf/seed0/folder-classification.npz")
    expected = stats.spearmanr(entropy["image_to_class_entropy"], [stats.entropy(row) for row in shares]).statistic
    assert found["image_to_class"]["spearman_human_entropy"] == {"entropy": pytest.approx(expected)}
