"""Hub correction against loops, and the bank that it learns from: what it may hold, and that it alone decides."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import cache_embeddings
import eval as evaluation
import report
import train
from datasets.bank import Bank, draw
from datasets.embeddings import Pairs, hold_out
from metrics import hubs, score_tiles
from metrics.hubs import Correction
from utils.checkpoint import Run
from utils.config import load_config

RUN = ["--dataset", "embeddings", "--quiet", "--method"]
CACHE = ["--dataset", "embeddings", "--root", "pairs.npz", "--quiet"]
SHORT = ["--set", "train.epochs=2", "model.width=8"]


def pairs_with_hubs(images=120, captions=2, dim=24, seed=0):
    """Embeddings of which some images are near every caption, and some captions near every image."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(images), captions)
    center = rng.normal(size=dim)
    image = rng.normal(size=(images, dim)) + rng.exponential(0.7, size=(images, 1)) * center
    text = rng.normal(size=(images, dim))[owner] * 0.1 + image[owner] + rng.normal(size=(len(owner), dim))
    text += rng.exponential(0.7, size=(len(owner), 1)) * center
    return {"image": image.astype(np.float32), "text": text.astype(np.float32), "image_of_text": owner}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with cached pairs, logit scale 20."""
    monkeypatch.chdir(tmp_path)
    np.savez("pairs.npz", **pairs_with_hubs())
    cache_embeddings.main([*CACHE, "--set", "data.options.logit_scale=20"])
    return tmp_path


def result(method="clip"):
    path = f"results/embeddings/given/{method}/seed0/embeddings-retrieval"
    with open(f"{path}.json") as file, np.load(f"{path}.npz") as arrays:
        return json.load(file), dict(arrays)


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def slow_constants(of_bank, correction, scale):
    """The constants (G,) by loops over the items."""
    result = []
    for scores in of_bank.tolist():
        if correction.kind == "nnn":
            best = sorted(scores, reverse=True)[: correction.k]
            result.append(correction.weight * sum(best) / len(best))
        else:
            mean = sum(math.exp(scale / 2 * score) for score in scores) / len(scores)
            result.append(correction.weight * math.log(mean) / (scale / 2))
    return result


@pytest.mark.parametrize("tile", [1, 500, 2**22])
@pytest.mark.parametrize("dim", [512, 768])
@pytest.mark.parametrize(
    "correction", [Correction("nnn", 0.5, 16), Correction("nnn", 0.25, 99), Correction("inverted-softmax", 0.75)]
)
def test_constants_are_those_of_loops(correction, dim, tile, monkeypatch):
    monkeypatch.setattr(score_tiles, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    item, query = (
        torch.nn.functional.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)
        for count in (30, 40)
    )
    scores = item @ query.T
    subtracted = hubs.constants(lambda rows: item[rows] @ query.T, 30, 40, correction, scale=100.0)
    np.testing.assert_allclose(subtracted, slow_constants(scores, correction, 100.0), rtol=1e-10)


def centered(image, text):
    """A refit that subtracts a part of the means of the pairs that it is given."""
    means = [np.asarray(side).mean(axis=0) / 4 for side in (image, text)]

    def move(*sides):
        moved = [np.asarray(side) - mean for side, mean in zip(sides, means, strict=True)]
        return [torch.from_numpy(side / np.linalg.norm(side, axis=1, keepdims=True)) for side in moved]

    return move


def slow_nll(frozen, owner, direction, correction, scale, seed, refit):
    """Mean NLL of the right items over the folds, in float64 by loops over the queries."""
    (image, text), rng = frozen, np.random.default_rng(seed)
    chosen = rng.permutation(len(image))[: max(10, 1500 * len(image) // len(text))]
    fold = {int(row): number % 5 for number, row in enumerate(chosen)}
    total = []
    for part in range(5):
        images = [row for row in range(len(image)) if fold.get(row) == part]
        captions = [row for row in range(len(text)) if fold.get(int(owner[row])) == part]
        bank_images = [row for row in fold if fold[row] != part]
        bank_captions = [row for row in range(len(text)) if fold.get(int(owner[row]), part) != part]
        if refit:
            caption_of = [next(row for row in bank_captions if owner[row] == image) for image in sorted(bank_images)]
            move = refit(frozen[0][sorted(bank_images)], frozen[1][caption_of])
            image, text = (side.numpy() for side in move(*frozen))
        if direction == "text_to_image":
            query, item, bank = text[captions], image[images], text[bank_captions]
            right = [[images[column] == owner[row] for column in range(len(images))] for row in captions]
        else:
            query, item, bank = image[images], text[captions], image[bank_images]
            right = [[owner[captions[column]] == row for column in range(len(captions))] for row in images]
        constant = 0.0
        if correction.kind != "none":  # the levels follow the frozen model's scale
            constant = np.array(slow_constants(item @ bank.T, correction, 20.0))
        for scores, is_right in zip(query @ item.T, right, strict=True):
            odds = np.exp(scale * (scores - constant))
            total.append(-math.log(odds[is_right].sum() / odds.sum()))
    return float(np.mean(total))


@pytest.mark.parametrize("direction", hubs.DIRECTIONS)
@pytest.mark.parametrize("refit", [None, centered])
def test_the_choice_is_the_least_cross_validated_nll(direction, refit):
    arrays = pairs_with_hubs(images=60)
    frozen, owner = (unit(arrays["image"]), unit(arrays["text"])), arrays["image_of_text"]
    chosen = hubs.choose(arrays["image"], arrays["text"], owner, 20.0, seed=3, refit=refit)[direction]
    scales = 20 * np.exp(np.linspace(-1.5, 1.5, 31))

    def least(correction):
        return min(slow_nll(frozen, owner, direction, correction, scale, 3, refit) for scale in scales)

    assert chosen["none"].nll == pytest.approx(least(hubs.NONE), abs=2e-3)
    for kind, ks in (("nnn", hubs.NEAREST), ("inverted-softmax", [None])):
        every = {(weight, k): least(Correction(kind, weight, k)) for weight in hubs.WEIGHTS for k in ks}
        assert chosen[kind].nll == pytest.approx(min(every.values()), abs=2e-3)
        assert every[chosen[kind].weight, chosen[kind].k] == pytest.approx(min(every.values()), abs=2e-3)
    best = hubs.decide({direction: chosen}, "auto")[direction]
    assert best.nll == min(one.nll for one in chosen.values()) < chosen["none"].nll
    assert hubs.decide({direction: chosen}, "nnn")[direction].kind == "nnn"


def test_too_few_images_choose_nothing():
    few = hubs.choose(torch.eye(9), torch.eye(9), range(9), 3.0)
    assert [list(kinds) for kinds in few.values()] == [["none"], ["none"]]
    assert hubs.decide(few, "nnn")["text_to_image"].kind == "none"


@pytest.mark.parametrize("kind", ["nnn", "inverted-softmax"])
def test_eval_subtracts_what_a_loop_subtracts(here, kind):
    train.main([*RUN, "clip"])
    evaluation.main([*RUN, "clip"])
    plain, _ = result()
    evaluation.main([*RUN, "clip", "--hubs", kind])
    values, arrays = result()
    bank = torch.load("checkpoints/embeddings/given/clip/seed0/adaptor.pt")["bank"]
    pairs = Pairs("embeddings", "given", "test0")
    image, text, owner = unit(pairs.image), unit(pairs.text), pairs.image_of_text
    scale = plain["posterior_scale"]
    right = {"text_to_image": owner[:, None] == np.arange(len(image))}
    right["image_to_text"] = right["text_to_image"].T
    for direction, query, item, of_bank in (
        ("text_to_image", text, image, unit(bank["text"])),
        ("image_to_text", image, text, unit(bank["image"])),
    ):
        record = dict(values["hubs"][direction])
        assert record["kind"] == kind
        scores = query @ item.T - slow_constants(item @ of_bank.T, Correction(**record), scale)
        best = scores.argmax(axis=1)
        hit = right[direction][np.arange(len(best)), best]
        assert values[direction]["recall"]["1"] == pytest.approx(hit.mean())
        odds = np.exp(scale * record["ratio"] * (scores - scores.max(axis=1, keepdims=True)))
        np.testing.assert_allclose(arrays[f"{direction}_probability"], 1 / odds.sum(axis=1), rtol=1e-4)
        without = values["uncorrected"][direction]
        assert without["recall"] == plain[direction]["recall"]
        gain = values[direction]["recall"]["1"] - plain[direction]["recall"]["1"]
        assert without["gain"]["recall"]["1"] == pytest.approx(gain, abs=1e-9)
        low, high = without["gain"]["interval"]["recall"]["1"]
        assert low <= gain <= high
        for name, record in without["uncertainty"].items():
            assert record == {key: plain[direction]["uncertainty"][name][key] for key in ("auroc", "aurc")}
        model = plain[direction]["calibration"]["model"]
        assert without["calibration"] == {"ece_15": model["ece_15"], "nll": model["nll"]}
    assert values["hubs"]["bank"] == {"images": 96, "split": None}
    assert values["config"]["hubs"] == kind and "uncorrected" not in plain and "hubs" not in plain


def test_both_scores_are_corrected_each_by_its_scale(here):
    train.main([*RUN, "asymvlm-psd", *SHORT])
    evaluation.main([*RUN, "asymvlm-psd", "--score", "both", "--hubs", "auto"])
    values, _ = result("asymvlm-psd")
    assert values["uncorrected"].keys() == values["other_score"]["uncorrected"].keys() == set(hubs.DIRECTIONS)


def test_a_learned_map_is_corrected_by_its_own_held_out_scores(here):
    train.main([*RUN, "linear", "--set", "model.penalty=0.3"])
    evaluation.main([*RUN, "linear"])
    adaptor, _, _ = Run(load_config("embeddings", "linear")).load("cpu")
    bank = Bank(**torch.load("checkpoints/embeddings/given/linear/seed0/adaptor.pt")["bank"])
    held_out, of_frozen = (
        hubs.decide(hubs.choose(*bank[:3], 20.0, 0, refit), "auto") for refit in (adaptor.refit, None)
    )
    record = result("linear")[0]["hubs"]
    for direction in hubs.DIRECTIONS:
        assert adaptor.image_map.any() and held_out[direction]._asdict() == record[direction]
        assert held_out[direction].nll != pytest.approx(of_frozen[direction].nll, rel=0.05)


def test_nothing_is_learned_from_the_evaluated_split(here):
    """With noise in place of the test part, bank, correction, penalty, temperature and weights stay bit for bit."""
    test = Pairs("embeddings", "given", "test0").image_id
    records = []
    for noise in (False, True):
        arrays = pairs_with_hubs()
        if noise:
            inside = np.isin(np.arange(len(arrays["image"])), test)
            rng = np.random.default_rng(1)
            arrays["image"][inside] = rng.normal(size=(inside.sum(), 24))
            of_text = inside[arrays["image_of_text"]]
            arrays["text"][of_text] = rng.normal(size=(of_text.sum(), 24))
        np.savez("pairs.npz", **arrays)
        cache_embeddings.main([*CACHE, "--set", "data.options.logit_scale=20", "--overwrite"])
        parts = []
        for method in ("clip", "linear"):
            train.main([*RUN, method, "--overwrite"])
            evaluation.main([*RUN, method, "--hubs", "auto"])
            saved = torch.load(f"checkpoints/embeddings/given/{method}/seed0/adaptor.pt")
            parts.append((saved["state_dict"], saved["bank"], result(method)[0]["hubs"]))
        records.append(parts)
    for one, other in zip(*records, strict=True):
        assert one[2] == other[2]
        for part in (0, 1):
            for name, value in one[part].items():
                equal = torch.equal(value, other[part][name]) if torch.is_tensor(value) else True  # the file's name
                assert equal or (torch.isnan(value).all() and torch.isnan(other[part][name]).all()), name


def test_a_bank_with_an_evaluated_image_is_refused(here, refusal):
    train.main([*RUN, "clip"])
    flags = [*RUN, "clip", "--split", "train1", "--allow-leakage"]
    cache_embeddings.main([*CACHE, "--splits", "train1", "--set", "data.options.logit_scale=20"])
    error = refusal(evaluation.main, *flags, "--hubs", "nnn")
    assert "72 of the 96 images" in error and "--hubs none" in error
    evaluation.main([*flags, "--hubs", "none"])


def test_the_bank_holds_no_held_out_pair(here):
    train.main([*RUN, "asymvlm-psd", *SHORT])
    bank = torch.load("checkpoints/embeddings/given/asymvlm-psd/seed0/adaptor.pt")["bank"]
    pairs = Pairs("embeddings", "given", "train0")
    _, held_out = hold_out(pairs.image_of_text, 0.1, 0)
    images = np.unique(pairs.image_of_text[torch.cat(held_out).numpy()])
    assert len(images) and not np.isin(pairs.image_id[images], bank["image_id"].numpy()).any()
    assert len(bank["image"]) == len(pairs.image) - len(images)


def test_a_bank_is_drawn_by_its_seed_and_keeps_pairs_together(here):
    pairs = Pairs("embeddings", "given", "train0")
    one, again, other = (draw(pairs, range(len(pairs.text)), seed, most=50) for seed in (0, 0, 1))
    assert torch.equal(one.text, again.text) and not torch.equal(one.text, other.text)
    assert len(one.text) == 50 and len(one.image) <= 50 and one.image.dtype == torch.float16
    source = {bytes(row): image for row, image in zip(pairs.text, pairs.image_of_text, strict=True)}
    for text, row in zip(one.text.numpy(), one.image_of_text.tolist(), strict=True):
        assert one.image_id[row] == pairs.image_id[source[bytes(text)]]


def test_what_cannot_be_corrected_is_named(here, refusal):
    train.main([*RUN, "clip"])
    path = "checkpoints/embeddings/given/clip/seed0/adaptor.pt"
    saved = torch.load(path)
    del saved["bank"]
    torch.save(saved, path)
    evaluation.main([*RUN, "clip"])
    assert "keeps no training queries" in refusal(evaluation.main, *RUN, "clip", "--hubs", "auto")
    assert "--task hierarchy" in refusal(evaluation.main, *RUN, "clip", "--task", "hierarchy", "--hubs", "auto")


def test_the_report_sets_both_beside_each_other(here, capsys, one_figure):
    """A table of the figures without and with, from one file; a method that is not corrected has those without."""
    for method in ("clip", "linear"):
        train.main([*RUN, method])
        evaluation.main([*RUN, method])
    report.main(["--dataset", "embeddings"])
    with open("results/embeddings/table.csv", newline="") as file:
        cells = {(row["row"], row["column"]): row for row in csv.DictReader(file) if row["table"] == "hubs"}
    values, _ = result("linear")
    plain, _ = result("clip")
    for direction in hubs.DIRECTIONS:
        both = {"without": values["uncorrected"][direction], "with": values[direction]}
        for which, part in both.items():
            mean = cells["linear", f"{direction}_recall_{which}"]["mean"]
            assert float(mean) == pytest.approx(100 * part["recall"]["1"])
            mean = cells["linear", f"{direction}_aurc_{which}"]["mean"]
            assert float(mean) == pytest.approx(part["uncertainty"]["probability"]["aurc"])
        ece = cells["linear", f"{direction}_ece_with"]["mean"]
        assert float(ece) == pytest.approx(values[direction]["calibration"]["model"]["ece_15"])
        without = cells["clip", f"{direction}_ece_without"]["mean"]
        assert float(without) == pytest.approx(plain[direction]["calibration"]["model"]["ece_15"])
        assert ("clip", f"{direction}_recall_with") not in cells
    assert "Hub correction" in capsys.readouterr().out


def test_classes_are_corrected_by_images_without_labels(here, refusal):
    """Against loops; another order of the bank's labels changes nothing."""
    train.main([*RUN, "clip"])
    arrays = pairs_with_hubs(captions=1)
    results = []
    for labels in (0, 1):
        label = np.random.default_rng(labels).permutation(np.arange(120) % 6)
        splits = Pairs("embeddings", "given", "test0").image_id
        label[splits] = np.arange(len(splits)) % 6  # those of the evaluated split stay
        np.savez("pairs.npz", image=arrays["image"], text=arrays["text"][:6], label=label, class_of_text=np.arange(6))
        settings = ["--set", "data.options.logit_scale=20"]
        cache_embeddings.main([*CACHE, "--overwrite", "--splits", "test0", "train0", *settings])
        flags = [*RUN, "clip", "--train-dataset", "embeddings", "--split", "test0"]
        evaluation.main([*flags, "--bank", "train0"])
        path = "results/embeddings/given/clip/seed0/embeddings-classification"
        with open(f"{path}.json") as file, np.load(f"{path}.npz") as columns:
            results.append((json.load(file), dict(columns)))
    values, columns = results[0]
    test, bank = Pairs("embeddings", "given", "test0"), Pairs("embeddings", "given", "train0")
    prompts = unit(test.text)
    constant = slow_constants(prompts @ unit(bank.image).T, Correction("nnn", 0.5, 16), 20.0)
    scores = unit(test.image) @ prompts.T
    accuracy = (np.argmax(scores - constant, axis=1) == test.label).mean()
    assert values["image_to_class"]["recall"]["1"] == pytest.approx(accuracy)
    plain = (np.argmax(scores, axis=1) == test.label).mean()
    assert values["uncorrected"]["image_to_class"]["recall"]["1"] == pytest.approx(plain)
    assert values["hubs"]["bank"] == {"images": 96, "split": "train0"}
    for name, column in columns.items():
        np.testing.assert_array_equal(column, results[1][1][name], err_msg=name)
    assert "shares 24 images" in refusal(evaluation.main, *flags, "--bank", "test0")
    assert "with --bank" in refusal(evaluation.main, *flags, "--hubs", "nnn")


def test_a_bank_is_of_classes(here, refusal):
    train.main([*RUN, "clip"])
    assert "leave it out of --task retrieval" in refusal(evaluation.main, *RUN, "clip", "--bank", "train0")
