"""Recall of both directions at COCO's size."""

import torch
import torch.nn.functional as F

from benchmarks.measure import Case
from metrics import retrieval, uncertainty
from models.base import Embedding, cosine
from tasks.retrieval import sides

IMAGES, TEXTS, DIM = 5000, 25_014, 512


def evaluation(device):
    """R@1/5/10 and R@1 by level both ways, 5,000 x 25,014, D = 512: in tiles, with margin and entropy of every query,
    against `topk` of one matrix, which gives neither."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(IMAGES, DIM, generator=generator), dim=-1)
    row_of = torch.arange(TEXTS) % IMAGES
    text = F.normalize(image[row_of] + 8 * torch.randn(TEXTS, DIM, generator=generator) / DIM**0.5, dim=-1)
    uncertainties = [torch.rand(count, generator=generator).to(device) for count in (TEXTS, IMAGES)]
    image, text, owner = image.to(device), text.to(device), row_of.numpy()
    adapted = [Embedding(x, direction=x) for x in (image, text)]

    def by_level(values, hit):
        return [float(hit[rows].mean()) for rows in uncertainty.levels(values.cpu().numpy(), 10)]

    def ours():
        t2i, i2t = (retrieval.rank(*side[:-1]) for side in sides(cosine, *adapted, owner, 1.0).values())
        recalls = [float(retrieval.recall_at(ranking, k).mean()) for ranking in (t2i, i2t) for k in (1, 5, 10)]
        hits = [retrieval.recall_at(ranking, 1) for ranking in (t2i, i2t)]
        return recalls + [level for pair in zip(uncertainties, hits) for level in by_level(*pair)]

    def textbook():
        score = image @ text.T
        target = row_of.to(device)
        t2i = score.T.topk(10, dim=1).indices == target[:, None]
        i2t = target[score.topk(10, dim=1).indices] == torch.arange(IMAGES, device=device)[:, None]
        recalls = [hits[:, :k].any(dim=1).float().mean().item() for hits in (t2i, i2t) for k in (1, 5, 10)]
        levels = []
        for values, hits in zip(uncertainties, (t2i, i2t), strict=True):
            levels += [part.mean().item() for part in hits[values.argsort(), 0].float().tensor_split(10)]
        return recalls + levels

    return Case(ours, textbook, flops=2.0 * IMAGES * TEXTS * DIM, memory=True)


CASES = {"evaluation": evaluation}
