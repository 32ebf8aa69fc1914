"""The drawn world: its splits, its captions and their exact ambiguity, checked against the words of the captions."""

import numpy as np
import pytest
from scipy import sparse

from datasets.shapes import ATTRIBUTES, NAMES, SCENES, UNNAMED, VALUES, Shapes, caption, draw
from metrics.retrieval import ambiguity, bayes_optimal_image_to_text, bayes_optimal_text_to_image
from utils.errors import UserError


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return Shapes(tmp_path_factory.mktemp("shapes"), train_images=400, val_images=150)


def read(text):
    """Parse a caption: {attribute: the value that its words name, or None}."""
    parsed = {}
    for name, values in ATTRIBUTES.items():
        named = {
            value
            for value, wordings in values.items()
            for wording in wordings
            if f" {wording} " in f" {text} "
        }  # fmt: skip
        assert len(named) <= 1, (text, named)
        parsed[name] = named.pop() if named else None
    return parsed


def test_captions_name_the_recorded_attributes(shapes):
    for written, mention in zip(shapes.captions("val"), shapes.mentions("val"), strict=True):
        parsed = read(written.text)
        for i, name in enumerate(NAMES):
            assert parsed[name] == (None if mention[i] == UNNAMED else VALUES[i][mention[i]]), written.text


def test_matches_equal_a_loop_over_words(shapes):
    scenes, matches = shapes.scenes("val"), shapes.matches("val").toarray()
    for column, written in list(enumerate(shapes.captions("val")))[::17]:
        parsed = read(written.text)
        for row, scene in enumerate(scenes):
            true = all(parsed[name] in (None, VALUES[i][scene[i]]) for i, name in enumerate(NAMES))
            assert matches[row, column] == true
    target = [written.image_id for written in shapes.captions("val")]
    assert matches[target, np.arange(len(target))].all()


def test_no_scene_is_in_both_splits():
    for sizes in ((400, 150, 100), (9000, 3000, 3000)):  # with more images than scenes, scenes repeat within a split
        shapes = Shapes("unused", **dict(zip(("train_images", "val_images", "test_images"), sizes, strict=True)))
        train, val, test = ({tuple(scene) for scene in shapes.scenes(split)} for split in ("train", "val", "test"))
        assert not train & val and not train & test and not val & test
    assert SCENES == 5760 and len(train) + len(val) + len(test) == SCENES and len(val) == len(test) == 1000


def test_a_seed_fixes_the_world_for_any_sizes(shapes, tmp_path):
    again = Shapes(tmp_path, train_images=50, val_images=20)
    assert again.captions("val") == shapes.captions("val")[:100]
    for image, first in zip(again.images("val"), shapes.images("val"), strict=False):
        assert image.path.read_bytes() == first.path.read_bytes()
    assert Shapes(tmp_path, seed=1, val_images=20).captions("val") != again.captions("val")


def test_drawings_of_a_scene_are_fixed_by_the_seed_and_vary():
    rng = np.random.default_rng(0)
    for scene in np.stack(np.unravel_index(rng.permutation(SCENES)[:60], [len(v) for v in VALUES]), axis=1):
        same = [np.asarray(draw(scene, np.random.default_rng(3), 96), dtype=float) for _ in range(2)]
        other = np.asarray(draw(scene, np.random.default_rng(4), 96), dtype=float)
        assert (same[0] == same[1]).all() and np.abs(same[0] - other).mean() > 5


def test_ambiguity_of_the_extremes(shapes):
    mentions, bits = shapes.mentions("val"), ambiguity(shapes.matches("val"))
    empty, full = (mentions == UNNAMED).all(axis=1), (mentions != UNNAMED).all(axis=1)
    assert empty.any() and full.any()
    assert np.allclose(bits[empty], np.log(150)) and np.allclose(bits[full], 0)


def test_bayes_optimal_recall_is_that_of_an_oracle():
    """An oracle that knows every scene and caption, and guesses among the matches, reaches the bound on average."""
    shapes = Shapes("unused", val_images=150)
    scenes, rng = shapes.scenes("val"), np.random.default_rng(0)
    hits, bounds = {"text": [], "image": []}, {"text": [], "image": []}
    for _ in range(60):
        mention = np.stack([caption(scene, rng)[1] for scene in scenes for _ in range(5)])
        target = np.repeat(np.arange(len(scenes)), 5)
        true = ((scenes[:, None] == mention[None]) | (mention[None] == UNNAMED)).all(axis=2)
        bounds["text"].append(bayes_optimal_text_to_image(sparse.csr_array(true)).mean())
        bounds["image"].append(bayes_optimal_image_to_text(sparse.csr_array(true), np.full(len(scenes), 5)).mean())
        guess = (true * rng.random(true.shape)).argmax(axis=0)
        hits["text"].append((guess == target).mean())
        specific = true / true.sum(axis=0) + 1e-6 * rng.random(true.shape)
        hits["image"].append((target[(true * specific).argmax(axis=1)] == np.arange(len(scenes))).mean())
    for side in hits:
        error = np.std(hits[side]) / np.sqrt(len(hits[side]))
        assert abs(np.mean(hits[side]) - np.mean(bounds[side])) < 4 * error, side


def test_chains_grow_one_attribute_at_a_time(shapes):
    chains = shapes.chains("val", count=30)
    assert len(chains) == 30
    for chain in chains:
        named = [sum(value is not None for value in read(prompt).values()) for prompt in chain]
        assert named == list(range(len(NAMES) + 1))


@pytest.mark.parametrize("name", ["train_images", "val_images", "captions_per_image", "image_size"])
def test_invalid_sizes_are_refused(name):
    for value in (0, -5, 3.5):
        with pytest.raises(ValueError, match="sizes must be integers"):
            Shapes("unused", **{name: value})


def test_unknown_split_is_named(shapes):
    with pytest.raises(UserError, match="no split 'dev'; it has train, val, test"):
        shapes.images("dev")
