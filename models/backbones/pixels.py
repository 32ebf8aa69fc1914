"""Preprocessing of images for a backbone. Imports no model library, since every loading process imports this."""

import contextlib
import io

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
import PIL.PngImagePlugin
from PIL.Image import Transpose
from torchvision.transforms import CenterCrop
from torchvision.transforms.functional import pil_to_tensor

LONGEST = 20  # a side longer than this multiple of the other is cut, if the final crop keeps the center only

UPRIGHT = {  # the transpose that turns each EXIF orientation upright; 1 is upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


IEND = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of a PNG
EOI = b"\xff\xd9"  # the last marker of a JPEG
# What may follow a JPEG without its end: bits that decode to different pixels, without a marker.
PADDINGS = [b"", *map(bytes, np.random.default_rng(0).integers(0, 255, (16, 64), dtype=np.uint8))]

# The texts of a PNG may take 1 GB: Pillow refuses the picture from 64 MB on.
PIL.PngImagePlugin.MAX_TEXT_MEMORY = 2**30


@contextlib.contextmanager
def lenient():
    """Let Pillow open a PNG inside the block whose texts or color profile are damaged or beyond 1 MB.

    Pixels that are read after the block must be whole, as always.
    """
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False


def ended(image):
    """Return a just opened PIL image again, with the mark that ends its file and that the file lacks.

    Returns None, or raises what Pillow raises, if more than the mark is missing. A PNG has checksums; a JPEG has all
    its pixels if none depends on what may follow, but a progressive one may lack whole scans, which nothing tells.
    """
    image.fp.seek(0)
    data = image.fp.read()
    if image.format == "PNG":
        present = next(size for size in range(len(IEND) - 1, -1, -1) if data.endswith(IEND[:size]))
        data += IEND[present:]
        _opened(data).verify()
        return _opened(data)
    if image.format != "JPEG" or image.info.get("progressive"):
        return None
    data = data.rstrip(b"\xff")
    components = data[data.rfind(b"\xff\xda") + 4]  # of the last scan: if it has all, it is the only one
    decoded = [np.asarray(_opened(data + padding + EOI)) for padding in PADDINGS]
    whole = components == len(image.getbands()) and all((other == decoded[0]).all() for other in decoded)
    return _opened(data + EOI) if whole else None


def _opened(data):
    with lenient():
        return PIL.Image.open(io.BytesIO(data))


class Transform:
    """Turn any PIL image into uint8 pixels (3, H, W), by the model's own resize and crop.

    steps: torchvision transforms of PIL images. Raises ValueError for gray values that have no agreed range.
    """

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, image):
        image = well_formed(image)
        if isinstance(self.steps[-1], CenterCrop):
            image = _middle(image)
        for step in self.steps:
            image = step(image)
        return pil_to_tensor(image.convert("RGB"))


def well_formed(image):
    """Convert a PIL image: upright, 8 bits, a mode that can be resized; raises ValueError if that is not possible."""
    turn = None
    with contextlib.suppress(Exception):  # Pillow raises many types on damaged EXIF, which is ignored
        turn = UPRIGHT.get(image.getexif().get(PIL.ExifTags.Base.Orientation))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise ValueError("gray values in floating point have no agreed range: save the image with 8 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("gray values beyond 16 bits have no agreed range: save the image with 8 bits")
        # Pillow's own conversion clips at 255, to a white image; mode I may hold 8 bits or 16.
        wide = image.mode != "I" or values.max() > 255
        return PIL.Image.fromarray((values >> 8 if wide else values).astype(np.uint8))
    if image.mode in ("RGB", "L", "RGBA", "LA"):
        return image
    # Palettes and black-and-white would be resized without interpolation.
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _middle(image):
    """Crop the long side of a ribbon to its middle: resized whole, 1 x 20,000 pixels become 224 x 4,480,000."""
    most = LONGEST * min(image.size)
    width, height = (side if side <= most else most + (side - most) % 2 for side in image.size)  # keeps the center
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
