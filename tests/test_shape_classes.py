"""The drawn world in classes: labels read back from pixels, disjoint splits, and the accuracy of the backbone."""

from itertools import combinations

import numpy as np
import PIL.Image
import pytest
from scipy import ndimage
from scipy.spatial import ConvexHull

import cache_embeddings
from datasets import shapes
from datasets.embeddings import cache_folder, read_meta
from datasets.shape_classes import BACKGROUNDS, CONTRAST, GAP, RANGES, ShapeClasses, is_shifted, paint_unseen
from datasets.shapes import OBJECT_RGB, VALUES, Shapes
from utils.config import load_config, make_source
from utils.errors import UserError

SMALL = {"train": 40, "val": 150, "test": 30, "shifted-train": 30, "shifted-val": 150, "shifted-test": 30}
TEMPLATES = ["a photo of a {}", "a banana {}"]
NAMES = ("shapes-objects", "shapes-colors")
LARGE, MIDDLE = VALUES[2].index("large"), VALUES[3].index("center")


def small(root, attribute="shape", **options):
    return ShapeClasses(root, attribute, **{"templates": TEMPLATES, "images": SMALL} | options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")


def named(pixel):
    """Return the object color nearest to a pixel, (3,), at the best fitting brightness."""
    light = np.linspace(0.85, 1.1, 6)[:, None]
    return min(OBJECT_RGB, key=lambda name: np.linalg.norm(light * OBJECT_RGB[name] - pixel, axis=1).min())


def read(pixels):
    """Read shape and color of a large object in the middle of an image, (S, S, 3), from its pixels alone.

    The object is the connected region of the color of the middle. A ring's middle is a small hole.
    """
    side = len(pixels)
    y, x = np.mgrid[:side, :side] / side - 0.5
    smooth = ndimage.uniform_filter(pixels, (3, 3, 1))
    middle = np.median(pixels[(x**2 + y**2) < 0.03**2], axis=0)
    part, _ = ndimage.label(np.linalg.norm(smooth - middle, axis=2) < 45)
    points = np.argwhere(part == part[side // 2, side // 2]) / side
    hull = ConvexHull(points)
    radius = np.linalg.norm(points[hull.vertices] - points.mean(axis=0), axis=1).max()
    if radius < 0.215:
        return "ring", named(np.median(pixels[abs(np.hypot(x, y) - 0.23) < 0.02], axis=0))
    solid, round_share = len(points) / side**2 / hull.volume, hull.volume / (np.pi * radius**2)
    if solid < 0.85:  # star 0.52, cross 0.72; the others 1
        return ("star" if solid < 0.63 else "cross"), named(middle)
    # circle 1, square 0.64, triangle 0.41
    return ("circle" if round_share > 0.8 else "square" if round_share > 0.52 else "triangle"), named(middle)


@pytest.mark.parametrize("split", RANGES)
def test_labels_agree_with_pixels(root, split):
    wide = {name: small(root / "wide", name, images=dict.fromkeys(RANGES, 250)) for name in ("shape", "color")}
    classes = {name: source.classes(split) for name, source in wide.items()}
    images, scenes = wide["shape"].images(split), wide["shape"].scenes(split)
    rows = [row for row, scene in enumerate(scenes) if scene[2] == LARGE and scene[3] == MIDDLE]
    assert len(rows) >= 10
    for row in rows:
        labels = tuple(classes[name].names[classes[name].label[row]] for name in ("shape", "color"))
        assert read(np.asarray(PIL.Image.open(images[row].path), dtype=float)) == labels, images[row].path


def test_every_object_and_texture_is_visible():
    rng = np.random.default_rng(0)
    for number, name in enumerate(BACKGROUNDS):
        for rgb in OBJECT_RGB.values():
            fill = np.array(rgb) + rng.uniform(-14, 14, 3)
            behind = paint_unseen(number, fill, 96, rng)
            assert behind.shape == (96, 96, 3) and behind.min() >= 0 and behind.max() <= 255
            assert np.linalg.norm(behind - fill, axis=2).min() > GAP - 5, name  # the line is sampled at nine points
            assert np.linalg.norm(np.ptp(behind.reshape(-1, 3), axis=0)) > 0.6 * CONTRAST, name
            other = paint_unseen(number, fill, 96, rng)
            assert np.abs(behind - other).mean() > 1, name


def test_shifted_splits_show_no_background_of_the_world(tmp_path, monkeypatch):
    def refuse(name, size, rng):
        raise AssertionError(f"painted {name}")

    monkeypatch.setattr(shapes, "_background", refuse)
    source = small(tmp_path)
    for split in RANGES:
        if is_shifted(split):
            assert len(source.images(split)) == SMALL[split]
            assert set(source.scenes(split)[:, 4]) == set(range(len(BACKGROUNDS)))
        else:
            with pytest.raises(AssertionError, match="painted"):
                source.images(split)
    assert not set(BACKGROUNDS) & set(VALUES[4])


@pytest.mark.parametrize("count", [50, 6000])  # with more images than scenes, scenes repeat within a split
def test_no_scene_is_in_two_splits(count):
    source = small("unused", images=dict.fromkeys(RANGES, count))
    scenes = {split: {tuple(scene) for scene in source.scenes(split)} for split in RANGES}
    for one, other in combinations(RANGES, 2):  # shifted and other scenes always differ: their backgrounds do
        assert is_shifted(one) != is_shifted(other) or not scenes[one] & scenes[other]
    pretraining = Shapes("unused", train_images=6000)
    trained, chosen, tested = ({tuple(s) for s in pretraining.scenes(split)} for split in ("train", "val", "test"))
    assert scenes["train"] <= trained and scenes["val"] <= chosen and scenes["test"] <= tested
    sizes = {split: len(distinct) for split, distinct in scenes.items()}
    full = {"train": 3760, "val": 1000, "test": 1000, "shifted-train": 2760, "shifted-val": 1000, "shifted-test": 2000}
    assert sizes == (full if count == 6000 else dict.fromkeys(RANGES, 50))


def test_a_seed_fixes_the_files_for_any_sizes(root, tmp_path):
    first, again = small(root), small(tmp_path, "color", images=dict.fromkeys(RANGES, 12))
    other, pretraining = small(tmp_path, seed=1), Shapes(tmp_path, train_images=12, val_images=12)
    for split in RANGES:
        drawn = [image.path.read_bytes() for image in first.images(split)[:12]]
        assert drawn == [image.path.read_bytes() for image in again.images(split)]
        assert len(set(drawn)) == 12
        assert not set(drawn) & {image.path.read_bytes() for image in other.images(split)}
        for name in ("train", "val"):  # scenes are shared with `shapes`, drawings are not
            assert not set(drawn) & {image.path.read_bytes() for image in pretraining.images(name)}


def test_both_attributes_have_one_id_space(root):
    shape, color, pretraining = small(root), small(root, "color"), Shapes(root)
    spaces = [shape.id_space(split) for split in RANGES]
    assert spaces == [color.id_space(split) for split in RANGES]
    assert len(set(spaces) | {pretraining.id_space("train"), pretraining.id_space("val")}) == len(RANGES) + 2
    assert small(root, seed=1).id_space("test") != shape.id_space("test")


def test_prompts_name_every_class_with_its_article(root):
    prompts = [caption.text for caption in small(root, "color").captions("test") if caption.image_id < 2]
    assert prompts == ["a photo of a red", "a banana red", "a photo of an orange", "a banana orange"]
    assert small(root).matches("test") is None and small(root).chains("test") == []


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_words_of_the_captions(name):
    source, pretraining = make_source(load_config(name)), Shapes("unused", train_images=2000)
    caption_words = {word for caption in pretraining.captions("train") for word in caption.text.split()}
    prompt_words = {word for prompt in source.captions("test") for word in prompt.text.split()}
    assert prompt_words <= caption_words and len(source.templates) >= 5


def accuracy(folder):
    """Zero-shot accuracy by a loop: the class whose averaged prompt is nearest to the image."""
    image, text, class_of_text, label = (
        np.load(folder / f"{part}.npy").astype(float) for part in ("image", "text", "class_of_text", "label")
    )
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    mean = [text[class_of_text == number].mean(axis=0) for number in range(int(class_of_text.max()) + 1)]
    prompts = [prompt / np.linalg.norm(prompt) for prompt in mean]
    return np.mean([np.argmax([row @ prompt for prompt in prompts]) == target for row, target in zip(image, label)])


def test_the_shift_lowers_the_accuracy_of_the_built_in_backbone(root, monkeypatch):
    monkeypatch.chdir(root)
    sizes = [f"data.options.images.{split}={count}" for split, count in SMALL.items()]
    accuracies = {}
    for name in NAMES:
        flags = ["--features", "pooled", "--device", "cpu", "--quiet", "--workers", "0"]
        cache_embeddings.main(["--dataset", name, *flags, "--splits", "val", "shifted-val", "--set", *sizes])
        folders = [cache_folder(name, "shapes-tiny", split) for split in ("val", "shifted-val")]
        for folder in folders:
            assert np.load(folder / "image_pooled.npy").shape[0] == 150 and read_meta(folder)["features"] == "pooled"
        accuracies[name] = [accuracy(folder) for folder in folders]
    shape, color = accuracies.values()  # of whole splits: 0.83 and 0.56 (chance 0.17), 1.00 and 0.82 (chance 0.13)
    assert shape[0] > 0.72 and 0.4 < shape[1] < shape[0] - 0.12, shape
    assert color[0] > 0.97 and 0.65 < color[1] < 0.93, color
    assert len(list((root / "data").glob("shape-classes/*/val/*.jpg"))) == 150  # drawn once for both


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"attribute": "size"}, "attribute must be shape or color, not 'size'"),
        ({"templates": []}, "templates must list prompts"),
        ({"templates": "a {}"}, "templates must list prompts"),
        ({"templates": ["a photo"]}, "templates must list prompts"),
        ({"templates": [3]}, "templates must list prompts"),
        ({"images": {"all": 3}}, "images must hold sizes of train, val, test, shifted-train"),
        ({"images": 3}, "images must hold sizes"),
        ({"images": {"val": 0}}, "sizes must be integers"),
        ({"images": {"val": 2.5}}, "sizes must be integers"),
        ({"image_size": 0}, "sizes must be integers"),
        ({"seed": -1}, "the seed of at least 0"),
        ({"seed": "one"}, "the seed of at least 0"),
    ],
)
def test_invalid_options_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        small("unused", **options)


def test_mistakes_on_the_command_line_are_named(root, monkeypatch, refusal):
    monkeypatch.chdir(root)
    error = refusal(cache_embeddings.main, "--dataset", "shapes-objects", "--splits", "shifted", "--device", "cpu")
    assert "no split 'shifted'; it has train, val, test, shifted-train, shifted-val, shifted-test" in error
    with pytest.raises(UserError, match=r"data\.options: attribute must be shape or color"):
        make_source(load_config("shapes-colors", settings=["data.options.attribute=taste"]))
