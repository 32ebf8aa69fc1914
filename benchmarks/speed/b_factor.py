"""BayesVLM's factors."""

import torch
import torch.nn.functional as F

from benchmarks.measure import Case
from models.laplace import curvature

ITEMS, CANDIDATES, DIM, PARTS = 2048, 8192, 512, 256


def b_factor(device):
    """BayesVLM's B factor: 2,048 items against 8,192 candidates, D = 512, by matrix products, against item by item (8
    items are timed)."""
    generator = torch.Generator().manual_seed(0)
    few = 10 * F.normalize(torch.randn(ITEMS // PARTS, DIM, generator=generator), dim=-1).to(device)
    # The items repeat, so the baseline's sum over one copy is the whole sum up to a factor, which `normed` removes.
    source = few.repeat(PARTS, 1)
    target = torch.randn(CANDIDATES, DIM, generator=generator).to(device)

    def ours():
        return normed(curvature(source, target, scale=100.0))

    def textbook():
        unit, total = F.normalize(target, dim=-1), 0
        for g in few:
            x = g / g.norm()
            jacobian = unit @ (torch.eye(len(g), device=device) - torch.outer(x, x)) / g.norm()
            probability = (100 * unit @ x).softmax(dim=0)
            slope = jacobian.T @ probability
            total = total + 100**2 * (jacobian.T @ (probability[:, None] * jacobian) - torch.outer(slope, slope))
        return normed(total)

    def normed(b):
        return (b * len(b) / b.trace()).cpu()

    # Cosines, two weighted sums of candidates for each item, and the candidates' weighted outer products.
    flops = 6.0 * ITEMS * CANDIDATES * DIM + 2.0 * CANDIDATES * DIM**2
    return Case(ours, textbook, flops=flops, parts=PARTS, memory=True)


CASES = {"b_factor": b_factor}
