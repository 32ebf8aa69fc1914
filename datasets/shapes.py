"""`shapes`: a drawn world in which the ambiguity of every caption is known exactly.

An image shows one object on a background; five attributes describe it, so there are 5,760 distinct scenes. A caption
names a random subset of the attributes, from none ("a photo") to all five. The grammar thus determines which images of
a gallery a caption is true of, its ambiguity, and the best recall that any method can reach.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
from scipy import sparse
from tqdm import tqdm

from datasets import Caption, Image, Source
from utils.device import usable_cores
from utils.errors import UserError
from utils.files import write_bytes

# Each value with its wordings in captions. Colors of objects and of backgrounds do not overlap, so that every object is
# visible and no word is ambiguous.
ATTRIBUTES = {
    "shape": {
        "circle": ["circle", "disc"],
        "square": ["square", "box"],
        "triangle": ["triangle"],
        "star": ["star"],
        "cross": ["cross"],
        "ring": ["ring"],
    },
    "color": {c: [c] for c in ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")},
    "size": {
        "small": ["small", "little", "tiny"],
        "medium": ["medium", "medium-sized"],
        "large": ["large", "big", "huge"],
    },
    "place": {
        "top left": ["in the top left", "in the upper left corner"],
        "top right": ["in the top right", "in the upper right corner"],
        "center": ["in the center", "in the middle"],
        "bottom left": ["in the bottom left", "in the lower left corner"],
        "bottom right": ["in the bottom right", "in the lower right corner"],
    },
    "background": {
        "black": ["black"],
        "gray": ["gray"],
        "white": ["white"],
        "brown": ["brown"],
        "striped": ["striped"],
        "checkered": ["checkered", "checked"],
        "dotted": ["dotted"],
        "grid": ["grid"],
    },
}
NAMES = tuple(ATTRIBUTES)
VALUES = tuple(tuple(values) for values in ATTRIBUTES.values())
CARDINALITY = tuple(len(values) for values in VALUES)
SCENES = int(np.prod(CARDINALITY))
# The scenes of each split, as a range of the world's shuffled scenes, and the stream of its random numbers. Ranges do
# not depend on sizes, so that changing a size never moves a scene to another split. val is for choices; nothing was
# chosen on test.
HELD_OUT = 2000
RANGES = {"train": (HELD_OUT, None), "val": (0, 1000), "test": (1000, HELD_OUT)}
STREAMS = {"train": 1, "val": 2, "test": 7}
UNNAMED = -1

OPENINGS = ("a photo", "a picture", "an image", "a drawing", "a snapshot")
NOUNS = ("object", "thing", "figure")  # words for the object if its shape is not named
BACKDROPS = ("on a {} background", "against a {} background", "in front of a {} backdrop")

OBJECT_RGB = {
    "red": (220, 35, 35), "orange": (245, 140, 20), "yellow": (240, 225, 40), "green": (40, 165, 60),
    "cyan": (60, 210, 220), "blue": (40, 75, 220), "purple": (135, 50, 190), "pink": (250, 130, 195),
}  # fmt: skip
PLAIN_RGB = {"black": (20, 20, 20), "gray": (128, 128, 128), "white": (238, 238, 238), "brown": (115, 78, 45)}
RADIUS = {"small": 0.11, "medium": 0.18, "large": 0.28}  # of the image's side
CENTER = {
    "top left": (0.3, 0.3), "top right": (0.7, 0.3), "center": (0.5, 0.5),
    "bottom left": (0.3, 0.7), "bottom right": (0.7, 0.7),
}  # fmt: skip

DRAWING = "v2"  # increase it when the drawings or captions of a seed change, so that old files and caches are not used


class Shapes(Source):
    """The drawn world as a source; draws the image files it lacks.

    root: folder for the files. seed: fixes scenes, drawings and wording. train_images, val_images, test_images: sizes
    of the splits. captions_per_image: as in COCO, five. image_size: side of a drawing in pixels.
    """

    def __init__(
        self, root, seed=0, train_images=8000, val_images=1000, test_images=2000, captions_per_image=5, image_size=96
    ):
        self.seed, self.captions_per_image, self.image_size = seed, captions_per_image, image_size
        self.sizes = {"train": train_images, "val": val_images, "test": test_images}
        numbers = (*self.sizes.values(), captions_per_image, image_size)
        if seed < 0 or any(not isinstance(number, int) or number < 1 for number in numbers):
            raise ValueError("sizes must be integers of at least 1, and the seed of at least 0")
        self.version = f"{DRAWING}-seed{seed}-{image_size}px"
        self.folder = Path(root) / self.version

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def scenes(self, split):
        """Sample the scenes of `split`, (N, 5) value indices; the splits share no scene."""
        if split not in self.sizes:
            raise UserError(f"shapes has no split '{split}'; it has {', '.join(self.sizes)}.")
        order = np.random.default_rng([self.seed, 0]).permutation(SCENES)
        rows = np.resize(order[slice(*RANGES[split])], self.sizes[split])  # every scene once before any occurs twice
        return np.stack(np.unravel_index(rows, CARDINALITY), axis=1)

    def images(self, split):
        """List the images of `split`, drawing the files that are missing; raises UserError for an unknown split."""
        scenes = self.scenes(split)
        return drawn(
            self.folder / split,
            len(scenes),
            lambda row: draw(scenes[row], self._rng(split, row, 0), self.image_size),
        )

    def captions(self, split):
        """List the captions of `split`, `captions_per_image` of each image; raises UserError for an unknown split."""
        return [
            Caption(row, row // self.captions_per_image, text) for row, (text, _) in enumerate(self._written(split))
        ]

    def mentions(self, split):
        """Return the attributes that each caption names, (M, 5) value indices or UNNAMED."""
        return np.stack([mention for _, mention in self._written(split)])

    def matches(self, split):
        # The matches of training captions would be tens of millions of pairs, and nothing reads them.
        if split == "train":
            return None
        scenes, mentions = self.scenes(split), self.mentions(split)
        true = np.ones((len(scenes), len(mentions)), dtype=bool)
        for attribute in range(len(NAMES)):
            named = mentions[:, attribute]
            true &= (scenes[:, attribute, None] == named) | (named == UNNAMED)
        return sparse.csr_array(true)

    def chains(self, split, count=200):
        """Write `count` chains of six prompts; each prompt names one attribute more than the one before."""
        scenes = self.scenes(split)
        rng = np.random.default_rng([self.seed, 2])
        chains = []
        for scene in scenes[rng.permutation(len(scenes))[:count]]:
            named = [np.where(np.arange(len(NAMES)) < length, scene, UNNAMED) for length in range(len(NAMES) + 1)]
            chains.append([describe(mention) for mention in named])
        return chains

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _written(self, split):
        written = []
        for row, scene in enumerate(self.scenes(split)):
            rng = self._rng(split, row, 1)
            written += [caption(scene, rng) for _ in range(self.captions_per_image)]
        return written

    def _rng(self, split, row, stream):
        return np.random.default_rng([self.seed, STREAMS[split], row, stream])


def drawn(folder, count, make):
    """List the `count` images of a split's folder; `make(row)` draws those whose files are missing."""
    images = [Image(row, folder / f"{row:06d}.jpg") for row in range(count)]
    present = {path.name for path in folder.glob("*.jpg")}
    missing = [image for image in images if image.path.name not in present]

    def save(image):
        content = io.BytesIO()
        make(image.id).save(content, format="JPEG", quality=92, subsampling=0)
        write_bytes(image.path, content.getbuffer())

    quiet = None if len(missing) > 500 else True
    pool = ThreadPoolExecutor(usable_cores())  # most of the work is NumPy's and Pillow's, outside of Python's lock
    try:
        done = pool.map(save, missing)
        for _ in tqdm(done, total=len(missing), desc=f"draw {folder.name}", unit="image", disable=quiet):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def caption(scene, rng):
    """Describe a random subset of `scene`'s attributes in random words; returns the text and its mention (5,)."""
    named = rng.permutation(len(NAMES))[: rng.integers(len(NAMES) + 1)]
    mention = np.full(len(NAMES), UNNAMED)
    mention[named] = scene[named]
    return describe(mention, rng), mention


def describe(mention, rng=None):
    """Write a mention, (5,) value indices or UNNAMED, as text: in random words, or without `rng` in the first ones."""

    def choose(options):
        return options[0] if rng is None else options[rng.integers(len(options))]

    words = {
        name: choose(ATTRIBUTES[name][VALUES[i][mention[i]]]) for i, name in enumerate(NAMES) if mention[i] != UNNAMED
    }
    opening = choose(OPENINGS)
    if not words:
        return opening
    backdrop = choose(BACKDROPS).format(words["background"]) if "background" in words else ""
    if set(words) == {"background"}:
        return f"{opening} of something {backdrop}"
    noun = words.get("shape") or choose(NOUNS)
    phrase = " ".join(filter(None, [words.get("size"), words.get("color"), noun]))
    phrase = ("an " if phrase[0] in "aeiou" else "a ") + phrase
    details = list(filter(None, [words.get("place"), backdrop]))
    frame = choose(["{0} of {1}", "{0} showing {1}", "{1}", "there is {1}"])
    if rng is not None and rng.random() < 0.3:  # background before place, as people also say
        details.reverse()
    return " ".join([frame.format(opening, phrase), *details])


def draw(scene, rng, size, paint=None):
    """Draw a scene, (5,) value indices, as a (size, size) RGB image with jitter of all attributes and pixel noise.

    paint: function that draws another background than the scene's, (size, size, 3), from the number of the background,
    the object's color (3,), the size and `rng`.
    """
    shape, color, extent, place = (VALUES[i][value] for i, value in enumerate(scene[:4]))
    center = np.array(CENTER[place]) + rng.uniform(-0.05, 0.05, 2)
    radius = RADIUS[extent] * rng.uniform(0.92, 1.08)
    fill = np.array(OBJECT_RGB[color]) + rng.uniform(-14, 14, 3)
    cover = _cover(shape, center, radius, rng.uniform(-0.3, 0.3), size)[..., None]
    behind = _background(VALUES[4][scene[4]], size, rng) if paint is None else paint(scene[4], fill, size, rng)
    pixels = cover * fill + (1 - cover) * (behind + rng.uniform(-12, 12, 3))
    pixels = pixels * rng.uniform(0.85, 1.1) + rng.normal(0, 9, pixels.shape)
    return PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _cover(shape, center, radius, turn, size):
    """Return the share of each pixel that the object covers, (size, size) in [0, 1]; drawn larger for smooth edges."""
    side = 4 * size
    canvas = PIL.Image.new("L", (side, side))
    pen = PIL.ImageDraw.Draw(canvas)
    box = [*(side * (center - radius)), *(side * (center + radius))]
    if shape == "circle":
        pen.ellipse(box, fill=255)
    elif shape == "ring":
        pen.ellipse(box, outline=255, width=round(0.36 * radius * side))
    else:
        pen.polygon([tuple(point) for point in side * (center + radius * _outline(shape, turn))], fill=255)
    return np.asarray(canvas.reduce(4), dtype=np.float64) / 255


def _background(name, size, rng):
    """Return a plain color, (3,), or a pattern in two grays at a random phase, (size, size, 1)."""
    if name in PLAIN_RGB:
        return np.array(PLAIN_RGB[name])
    period = size / 8
    x = np.arange(size) + rng.uniform(0, 2 * period)
    y = np.arange(size)[:, None] + rng.uniform(0, 2 * period)
    dark = {
        "striped": lambda: (x + y) % (2 * period) < period,
        "checkered": lambda: (x // period + y // period) % 2 == 0,
        "dotted": lambda: (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (0.3 * period) ** 2,
        "grid": lambda: (x % period < 0.25 * period) | (y % period < 0.25 * period),
    }[name]()
    return np.where(dark, 70.0, 185.0)[..., None]


def _outline(shape, turn):
    """Return the corners of a shape in the unit disc, (K, 2), rotated by `turn` radians."""
    if shape == "cross":
        a = 0.34
        x = np.array([-a, a, a, 1, 1, a, a, -a, -a, -1, -1, -a])
        points = np.stack([x, np.roll(x, -3)], axis=1)  # y is x a quarter of the outline later
    else:
        corners, inner = {"square": (4, None), "triangle": (3, None), "star": (5, 0.42)}[shape]
        radius = np.ones(corners) if inner is None else np.tile([1, inner], corners)
        angle = np.arange(len(radius)) * 2 * np.pi / len(radius) + (np.pi / 4 if shape == "square" else -np.pi / 2)
        points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    cos, sin = np.cos(turn), np.sin(turn)
    return points @ np.array([[cos, sin], [-sin, cos]])
