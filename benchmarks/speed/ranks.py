"""Ranks in both directions on the scale of a training split."""

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.measure import Case
from metrics import retrieval
from models.base import Embedding, cosine
from tasks.retrieval import sides

IMAGES, PER_IMAGE, DIM = 118_287, 5, 512
SAMPLE = 256  # images, with their captions, that are ranked


def ranks(device):
    """Ranks among 118,287 images and 591,435 captions, D = 512, of 256 images and 1,280 captions: ours, with margin and
    entropy, against `topk` of one matrix a direction. Core hours are of all queries, extrapolated."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(IMAGES, DIM, generator=generator), dim=-1)
    text = image.repeat_interleave(PER_IMAGE, dim=0)
    for part in text.split(8192):  # in place: a copy of the gallery would be another gigabyte
        part.add_(8 * torch.randn(part.shape, generator=generator) / DIM**0.5)
        part.div_(part.norm(dim=-1, keepdim=True))
    image, text = image.to(device), text.to(device)
    caption = np.arange(SAMPLE * PER_IMAGE)
    adapted = (Embedding(x, direction=x) for x in (image, text))
    both = sides(cosine, *adapted, np.arange(len(text)) // PER_IMAGE, 1.0)

    def ours():
        t2i = retrieval.rank(both["text_to_image"].score, IMAGES, caption, caption // PER_IMAGE)
        i2t = retrieval.rank(both["image_to_text"].score, len(text), caption // PER_IMAGE, caption)
        return [float(retrieval.recall_at(ranking, k).mean()) for ranking in (t2i, i2t) for k in (1, 5, 10)]

    def textbook():
        right = torch.from_numpy(caption // PER_IMAGE).to(device)
        t2i = (text[: len(caption)] @ image.T).topk(10, dim=1).indices == right[:, None]
        answer = (image[:SAMPLE] @ text.T).topk(10, dim=1).indices // PER_IMAGE
        hits = t2i, answer == torch.arange(SAMPLE, device=device)[:, None]
        return [hit[:, :k].any(dim=1).float().mean().item() for hit in hits for k in (1, 5, 10)]

    def note(seconds):
        return f"{seconds * IMAGES / SAMPLE / 3600:.2f} hours for all"

    # Both directions could share one product.
    return Case(ours, textbook, flops=2.0 * SAMPLE * len(text) * DIM, memory=True, note=note)


CASES = {"ranks": ranks}
