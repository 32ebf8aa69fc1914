"""Training pairs as train.py reads them: from memory, or beyond it from the memory map in shuffled blocks.

A pair is a caption and its image. Both classes give an epoch its order of captions, and its batches:

    order = data.order(rows, batch)
    for chosen, (image, text) in data.batches(order, batch): ...
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

BLOCK = 64  # captions that are read at once: 64 kB in float16 at D = 512
WINDOW = 2**18  # captions that are in memory at once, and from which batches are drawn: 256 MB


class InMemory:
    """All embeddings (N, D) and (M, D), float16, on one device; image_of_text (M,)."""

    in_memory = True

    def __init__(self, image, text, image_of_text):
        self.image, self.text, self.image_of_text, self.device = image, text, image_of_text, image.device

    def order(self, rows, batch):
        """Captions `rows` (M,) in a random order."""
        return rows[torch.randperm(len(rows))]

    def batches(self, order, batch, first=0):
        """Yield captions (B,) and their pairs (B, D), (B, D), float32, from the batch number `first` on."""
        for chosen in order.to(self.device).split(batch)[first:]:
            yield chosen, self.take(chosen)

    def take(self, rows):
        """Images (B, D) and texts (B, D), float32, of the captions `rows` (B,)."""
        rows = rows.to(self.device)
        return self.image.index_select(0, self.image_of_text[rows]).float(), self.text.index_select(0, rows).float()


class OnDisk:
    """The embeddings of an opened Pairs, which stay on disk.

    An epoch is cut into windows of whole batches. A window is filled from blocks of neighbouring captions that are
    drawn at random, and its captions are shuffled; while batches are drawn from it, a thread reads the next. So every
    caption comes once an epoch, but neighbours stay within a window. pooled: as in `Pairs.fed`. meet: called once a
    window is read, by which processes that share a step wait for the slowest disk.
    """

    in_memory = False

    def __init__(self, pairs, device, pooled=False, meet=lambda: None):
        self.image, self.text = pairs.fed("image", pooled), pairs.fed("text", pooled)
        self.image_of_text, self.device = np.asarray(pairs.image_of_text), device
        self.meet = meet

    def order(self, rows, batch):
        """Captions `rows` (M,) in a random order, as windows are."""
        # Where blocks begin is drawn, too: captions share a block in one epoch, and do not in another.
        rows = rows.roll(int(torch.randint(BLOCK, ())))
        blocks = torch.randperm(-(-len(rows) // BLOCK))
        places = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        drawn = rows[places[places < len(rows)]]
        return torch.cat([part[torch.randperm(len(part))] for part in drawn.split(_window(batch))])

    def batches(self, order, batch, first=0):
        """Yield captions (B,) and their pairs (B, D), (B, D), float32, from the batch number `first` on."""
        each = _window(batch) // batch
        windows = order.split(_window(batch))[first // each :]
        with ThreadPoolExecutor(1) as thread:
            reading = thread.submit(self._read, windows[0]) if windows else None
            for number, rows in enumerate(windows):
                image, text, image_at, text_at = reading.result()
                self.meet()
                reading = thread.submit(self._read, windows[number + 1]) if number + 1 < len(windows) else None
                for start in range(0 if number else first % each * batch, len(rows), batch):
                    part = slice(start, start + batch)
                    pairs = image.index_select(0, image_at[part]), text.index_select(0, text_at[part])
                    yield rows[part], tuple(side.float() for side in pairs)

    def take(self, rows):
        """Images (B, D) and texts (B, D), float32, of the captions `rows` (B,)."""
        image, text, image_at, text_at = self._read(rows.cpu())
        return image.index_select(0, image_at).float(), text.index_select(0, text_at).float()

    def _read(self, rows):
        """Read what captions `rows` (B,) need, in the order of the files: images, texts, and the rows there of each."""
        text_rows, text_at = np.unique(rows.numpy(), return_inverse=True)
        image_rows, image_at = np.unique(self.image_of_text[rows.numpy()], return_inverse=True)
        arrays = self.image[image_rows], self.text[text_rows], image_at, text_at
        return tuple(torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays)


def _window(batch):
    """Captions of a window: whole batches, one at least."""
    return max(1, WINDOW // batch) * batch


def bytes_of(pairs, pooled=False):
    """Bytes of the embeddings of an opened Pairs in memory."""
    return sum(2 * int(np.prod(pairs.fed(side, pooled).shape)) for side in ("image", "text"))
