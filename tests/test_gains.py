"""The table of every method against the baseline, and the sentences that a page opens with."""

from pathlib import Path

import numpy as np
import pytest

from metrics.comparison import PairedBootstrap, paired_difference
from metrics.uncertainty import auroc
from reporting import findings
from reporting.evaluations import Evaluation
from reporting.runs import Arrays, Result
from reporting.tables.gains import gains, gains_of
from reporting.words import MINUS

IMAGES, CAPTIONS = 60, 300
OWNER = np.repeat(np.arange(IMAGES), CAPTIONS // IMAGES)


def result(variant, hit, seed=0, uncertainty=None, image_hit=None, owner=OWNER, spearman=None):
    """A Result of retrieval that holds what the table reads; hit: (CAPTIONS,)."""
    rng = np.random.default_rng(5)
    arrays = {"text_to_image_hit": hit, "text_to_image_entropy": 1 - hit + 0.9 * rng.random(CAPTIONS)}
    arrays["image_to_text_hit"] = np.ones(IMAGES) if image_hit is None else image_hit
    if owner is not None:
        arrays["image_of_text"] = owner
    records = {"entropy": {"spearman": 0.983}}
    if uncertainty is not None:
        arrays["text_uncertainty"] = uncertainty
        records["query"] = {"spearman": spearman} if spearman else {}
    values = {
        "variant": variant,
        "config": {"seed": seed},
        "seen_in_training": 0,
        "text_to_image": {"levels_by": "query" if uncertainty is not None else None, "uncertainty": records},
    }
    made = Result(Path(f"tiny/{variant}/seed{seed}/shapes-retrieval.json"), values)
    made.__dict__["arrays"] = Arrays(Path("arrays.npz"), arrays)
    return made


def block(*results):
    variants = {}
    for each in results:
        variants.setdefault(each.values["variant"], []).append(each)
    return Evaluation("retrieval", "shapes", "tiny", variants)


@pytest.fixture
def hits():
    """Right answers of three methods: of an image all captions are right, or none."""
    rng = np.random.default_rng(0)
    base = (rng.random(IMAGES) < 0.4)[OWNER].astype(float)
    better = np.maximum(base, (rng.random(IMAGES) < 0.5)[OWNER])
    return {"clip": base, "same": base, "better": better}


def test_differences_are_paired_over_images(hits):
    uncertainty = np.random.default_rng(1).random(CAPTIONS)
    part = block(
        *(result(name, hit, uncertainty=None if name == "clip" else uncertainty) for name, hit in hits.items())
    )
    figure = gains_of(part)["text_to_image_r1"]
    bootstrap = PairedBootstrap(OWNER)
    expected = paired_difference(bootstrap.mean(hits["better"]), bootstrap.mean(hits["clip"]))
    assert figure["better"].difference == expected and figure["better"].significant
    assert figure["better"].adjusted == pytest.approx(2 * expected.p)  # two methods are compared
    assert figure["better"].value == hits["better"].mean() and figure["clip"].difference is None
    assert figure["same"].difference[:3] == (0, 0, 0) and not figure["same"].significant
    singly = PairedBootstrap(np.arange(CAPTIONS))
    narrow = paired_difference(singly.mean(hits["better"]), singly.mean(hits["clip"]))
    assert expected.high - expected.low > 1.5 * (narrow.high - narrow.low)  # five captions are no five witnesses


def test_a_learned_uncertainty_is_compared_with_the_entropy_of_the_baseline(hits):
    learned = 1 - hits["same"] + np.random.default_rng(2).random(CAPTIONS)
    part = block(result("clip", hits["clip"]), result("same", hits["same"], uncertainty=learned))
    gain = gains_of(part)["query_auroc"]["same"]
    entropy = part.results["clip"][0].arrays["text_to_image_entropy"]
    assert gain.value == pytest.approx(auroc(learned, hits["same"]))
    assert gain.difference.mean == pytest.approx(gain.value - auroc(entropy, hits["clip"]))
    assert "clip" not in gains_of(part)["query_auroc"]


def test_seeds_are_averaged(hits):
    seeds = [hits["clip"], hits["better"]]
    runs = [result("both", hit, seed, uncertainty=np.arange(CAPTIONS) / 7) for seed, hit in enumerate(seeds)]
    gain = gains_of(block(result("clip", hits["clip"]), *runs))["text_to_image_r1"]["both"]
    assert gain.value == pytest.approx(np.mean(seeds))
    assert gain.difference.mean == pytest.approx(np.mean(seeds) - hits["clip"].mean())


def test_the_table_and_the_sentences(hits):
    uncertainty = np.random.default_rng(3).random(CAPTIONS)
    part = block(
        result("clip", hits["clip"]),
        result("better", hits["better"], uncertainty=uncertainty, spearman=0.5),
        result("worse", 0 * hits["clip"], uncertainty=uncertainty, spearman=-0.9),
    )
    table = gains(part)
    [(_, rows)] = table.groups
    cells = {row.name: row.cells for row in rows}
    gain = gains_of(part)["text_to_image_r1"]["better"]
    low, high = (f"{100 * value:+.1f}" for value in gain.difference[1:3])
    assert cells["better"]["gain_text_to_image_r1_less"].text == f"+{100 * gain.difference.mean:.1f} [{low}, {high}]‡"
    assert cells["better"]["gain_text_to_image_r1_adjusted_p"].mean == gain.adjusted
    assert "gain_text_to_image_r1_less" not in cells["clip"] and table.title == "Against clip"
    assert "drawn singly" not in table.note
    text = findings.sentences(part)
    assert f"Significantly higher: better (+{100 * gain.difference.mean:.1f})." in text[0]
    assert f"Significantly lower: worse ({MINUS}{100 * hits['clip'].mean():.1f})." in text[0]
    assert (
        text[1]
        == "R@1 image→text: clip has 100.0 %. No method differs from it beyond the sampling error of the images."
    )
    assert "(better)" in text[2] and "needs the search but no training" in text[2]
    assert text[-1].endswith("is 0.500 (better), that of the entropy of clip 0.983.")


def test_old_results_without_owners_of_captions_say_so(hits):
    part = block(
        result("clip", hits["clip"], owner=None), result("better", hits["better"], owner=None, uncertainty=OWNER)
    )
    assert "captions were drawn singly" in gains(part).note


def test_without_a_baseline_there_is_nothing_to_say(hits):
    for part in (block(result("clip", hits["clip"])), block(result("better", hits["better"], uncertainty=OWNER / 9))):
        assert gains(part) is None and findings.sentences(part) == []
