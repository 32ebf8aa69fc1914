"""Densities of a bank of training embeddings."""

import torch
import torch.nn.functional as F

from benchmarks.measure import Case
from models import density

QUERIES, BANK, DIM, NEAREST, BETA = 5000, 10_000, 512, 8, 20.0


def densities(device):
    """Eight nearest neighbors and kernel density of 5,000 queries in a bank of 10,000, D = 512: in blocks, against one
    matrix of cosines each."""
    generator = torch.Generator().manual_seed(0)
    query, bank = (torch.randn(count, DIM, generator=generator).to(device) for count in (QUERIES, BANK))

    def ours():
        near, kernel = density.nearest(query, bank, NEAREST), density.kernel(query, bank, BETA)
        return [near.sum().cpu(), kernel.sum().cpu()]

    def textbook():
        cosine = F.normalize(query, dim=-1) @ F.normalize(bank, dim=-1).T
        near = cosine.topk(NEAREST).values.mean(dim=-1)
        cosine = F.normalize(query, dim=-1) @ F.normalize(bank, dim=-1).T
        return [near.sum().cpu(), (BETA * cosine).exp().mean(dim=-1).log().sum().cpu()]

    return Case(ours, textbook, flops=4.0 * QUERIES * BANK * DIM, memory=True)


CASES = {"densities": densities}
