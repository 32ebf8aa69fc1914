"""Images of the drawn world in classes, by shape or by color, also on backgrounds unseen in training.

The built-in backbone and the captions of `shapes` know eight backgrounds, all of them gray, black, white or brown. The
`shifted` splits show the same 720 objects on eight others, textures in muted colors that are visibly different from the
object's color. Labels thus remain exact, while the accuracy of the backbone drops.
"""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL.Image

from datasets import Caption, Classes, Source, shapes
from datasets.shapes import CARDINALITY, DRAWING, NAMES, VALUES, draw, drawn
from utils.errors import UserError, one_of

# Each background with its texture and the two colors that the texture mixes.
BACKGROUNDS = {
    "sky": ("gradient", (120, 165, 215), (225, 225, 225)),
    "dusk": ("gradient", (110, 85, 130), (225, 175, 140)),
    "meadow": ("blades", (90, 112, 75), (142, 155, 108)),
    "water": ("waves", (88, 112, 122), (132, 158, 164)),
    "bricks": ("bricks", (195, 180, 165), (150, 85, 70)),
    "sand": ("clouds", (175, 140, 95), (225, 200, 150)),
    "camouflage": ("patches", (70, 80, 50), (150, 135, 95)),
    "carpet": ("zigzag", (115, 65, 90), (180, 140, 140)),
}
SHIFTED = (*CARDINALITY[:4], len(BACKGROUNDS))
# Smallest distances in RGB (0 to 255), before the jitter of every drawing.
GAP = 80  # between an object's color and every color of its background
CONTRAST = 40  # between the two colors of a background, so that its texture is visible

# The scenes that a split may show, as a range of the world's shuffled scenes: those of `shapes`, whose val and test the
# backbone was not trained on, and of the world with other backgrounds.
RANGES = shapes.RANGES | {"shifted-train": (3000, None), "shifted-val": (0, 1000), "shifted-test": (1000, 3000)}
IMAGES = {"train": 2000, "val": 500, "test": 1000, "shifted-train": 2000, "shifted-val": 500, "shifted-test": 1000}
ATTRIBUTES = ("shape", "color")
BACKDROPS = "b1"  # increase it when the shifted backgrounds of a seed change, see shapes.DRAWING


class ShapeClasses(Source):
    """New drawings of the world of `shapes`, in classes by one attribute; draws the image files that are missing.

    root: folder for the files, which do not depend on attribute and templates. attribute: shape or color. templates:
    prompts with {} in place of the class name. seed: fixes scenes and drawings; must be the seed of the `shapes` that
    the backbone was trained on. images: sizes of splits that differ from IMAGES. image_size: side of a drawing in
    pixels. Raises ValueError for an invalid option.
    """

    def __init__(self, root, attribute, templates, seed=0, images=None, image_size=96):
        self.attribute, self.templates, self.seed, self.image_size = attribute, templates, seed, image_size
        one_of("attribute", attribute, ATTRIBUTES)
        strings = isinstance(templates, list) and all(isinstance(template, str) for template in templates)
        if not (strings and templates and all(template.count("{}") == 1 for template in templates)):
            raise ValueError(f"templates must list prompts with one {{}} each, not {templates!r}")
        images = {} if images is None else images
        if not isinstance(images, dict) or set(images) - set(IMAGES):
            raise ValueError(f"images must hold sizes of {', '.join(IMAGES)}, not {images!r}")
        self.sizes = IMAGES | images
        numbers = [(number, 1) for number in (*self.sizes.values(), image_size)] + [(seed, 0)]
        if any(type(number) is not int or number < least for number, least in numbers):
            raise ValueError("sizes must be integers of at least 1, and the seed of at least 0")
        # The attribute is left out: both attributes read the same files, so an image has one id space. Drawings of
        # `shapes` are other files with other ids, although it shares the scenes of train.
        self.version = f"{DRAWING}-{BACKDROPS}-seed{seed}-{image_size}px"
        self.folder = Path(root) / self.version

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def scenes(self, split):
        """Sample the scenes of `split`, (N, 5) value indices; the last is into BACKGROUNDS if the split is shifted.

        The splits share no scene, and `val` and `test` share none with the train split of `shapes`. Raises UserError
        for an unknown split.
        """
        if split not in RANGES:
            raise UserError(f"this data set has no split '{split}'; it has {', '.join(RANGES)}.")
        # [seed, 0] is the order in which `shapes` holds scenes out.
        world, stream = (SHIFTED, 3) if is_shifted(split) else (CARDINALITY, 0)
        order = np.random.default_rng([self.seed, stream]).permutation(int(np.prod(world)))
        rows = np.resize(order[slice(*RANGES[split])], self.sizes[split])  # every scene once before any occurs twice
        return np.stack(np.unravel_index(rows, world), axis=1)

    def images(self, split):
        """List the images of `split`, drawing the files that are missing; raises UserError for an unknown split."""
        scenes, stream = self.scenes(split), 11 + list(RANGES).index(split)  # `shapes` uses streams below 11
        paint = paint_unseen if is_shifted(split) else None
        return drawn(
            self.folder / split,
            len(scenes),
            lambda row: draw(scenes[row], np.random.default_rng([self.seed, stream, row]), self.image_size, paint),
        )

    def captions(self, split):
        """List the prompts class by class: the templates, with "an" for "a" before a vowel."""
        prompts = []
        for number, name in enumerate(self._names):
            article = "an" if name[0] in "aeiou" else "a"
            for template in self.templates:
                prompt = re.sub(r"\ba \{\}", f"{article} {{}}", template).replace("{}", name)
                prompts.append(Caption(len(prompts), number, prompt))
        return prompts

    def classes(self, split):
        """Return the classes of the images of `split`; raises UserError for an unknown split."""
        return Classes(list(self._names), [], self.scenes(split)[:, NAMES.index(self.attribute)])

    @property
    def _names(self):
        return VALUES[NAMES.index(self.attribute)]


def is_shifted(split):
    """Whether a split shows BACKGROUNDS instead of those of `shapes`."""
    return split.startswith("shifted-")


def paint_unseen(number, fill, size, rng):
    """Draw background `number` of BACKGROUNDS behind an object of color `fill`: (size, size, 3), from 0 to 255."""
    texture, *colors = list(BACKGROUNDS.values())[number]
    while True:
        pair = np.array(colors) + rng.uniform(-20, 20, (2, 3)) + rng.uniform(-60, 60)
        pair = pair.clip(10, 245)
        between = pair[0] + np.linspace(0, 1, 9)[:, None] * (pair[1] - pair[0])
        if np.linalg.norm(between - fill, axis=1).min() > GAP and np.linalg.norm(pair[1] - pair[0]) > CONTRAST:
            break
    share = TEXTURES[texture](size, rng)[..., None]
    return pair[0] + share * (pair[1] - pair[0])


def _axes(size, rng):
    """Return x (1, size) and y (size, 1) of the pixels of a picture of side 1, at a random phase."""
    steps = np.arange(size) / size
    return steps[None] + rng.uniform(), steps[:, None] + rng.uniform()


def _gradient(size, rng):
    x, y = _axes(size, rng)
    turn = rng.uniform(0, 2 * np.pi)
    along = np.cos(turn) * x + np.sin(turn) * y
    return (along - along.min()) / np.ptp(along)


def _zigzag(size, rng):
    x, y = _axes(size, rng)
    return ((6 * y + 1.2 * abs(6 * x % 2 - 1)) % 1 < 0.5).astype(float)


def _waves(size, rng):
    x, y = _axes(size, rng)
    return 0.5 + 0.5 * np.sin(2 * np.pi * (6 * y + 0.4 * np.sin(4 * np.pi * x)))


def _bricks(size, rng):
    x, y = _axes(size, rng)
    row = 8 * y
    column = 4 * x + 0.5 * (row // 1 % 2)
    return ((row % 1 > 0.15) & (column % 1 > 0.08)).astype(float)


def _clouds(size, rng):
    total = sum(_field(size, cells, cells, rng) * weight for cells, weight in ((4, 3), (9, 2), (20, 1)))
    return (total - total.min()) / np.ptp(total)


def _blades(size, rng):
    return _field(size, 48, 10, rng)


def _patches(size, rng):
    x, y = np.arange(size)[None, :, None] / size, np.arange(size)[:, None, None] / size
    middle, shade = rng.uniform(0, 1, (2, 16)), rng.permutation(16) / 15
    return shade[((x - middle[0]) ** 2 + (y - middle[1]) ** 2).argmin(axis=2)]


def _field(size, across, down, rng):
    """Return random values in [0, 1] of a coarse grid, interpolated to (size, size)."""
    grid = PIL.Image.fromarray(rng.integers(0, 256, (down, across), dtype=np.uint8))
    return np.asarray(grid.resize((size, size), PIL.Image.Resampling.BICUBIC)) / 255


TEXTURES = {
    "gradient": _gradient, "zigzag": _zigzag, "waves": _waves, "bricks": _bricks,
    "clouds": _clouds, "blades": _blades, "patches": _patches,
}  # fmt: skip
