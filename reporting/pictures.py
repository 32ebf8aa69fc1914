"""Small copies of image files, which a page holds inside."""

import base64
import functools
import io

import PIL.Image

THUMBNAIL = 96  # pixels of the longer side


class Pictures:
    """Small copies of image files; each is in the page once, however often it is shown."""

    def __init__(self):
        self.kept = {}  # {data URI: (number, size)}

    def show(self, path):
        """Keep a copy and return its number; None where the file is missing or broken."""
        thumbnail = _thumbnail(path)
        if thumbnail is None:
            return None
        uri, size = thumbnail
        return self.kept.setdefault(uri, (len(self.kept), size))[0]


@functools.cache
def _thumbnail(path):
    """Make a small copy of an image file: data URI and (width, height); None where the file is missing or broken."""
    try:
        with PIL.Image.open(path) as image:
            small = image.convert("RGB")
    except Exception:  # Pillow raises a dozen kinds on a broken file
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = {}
    for kind, options in (("jpeg", {"quality": 80}), ("png", {"optimize": True})):  # flat drawings are smaller as PNG
        file = io.BytesIO()
        small.save(file, kind, **options)
        encoded[kind] = file.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}", small.size
