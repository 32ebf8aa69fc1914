"""The losses of a batch of pairs."""

from functools import partial, update_wrapper

import torch
import torch.nn.functional as F

from benchmarks.measure import Case
from models.distributions import power_spherical, von_mises_fisher
from models.pair_loss import Linear, Logarithm, PairScore

DIM = 512


def info_nce(device, family, batch):
    """{family} InfoNCE of {batch} pairs, D = 512, with gradients: in tiles, against autograd on the matrix."""
    generator = torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(2, batch, DIM, generator=generator), dim=-1).to(device)
    eta = (30 * F.normalize(image + 2 * text, dim=-1)).requires_grad_()
    logarithmic = family == "power spherical"
    log_normalizer = (power_spherical if logarithmic else von_mises_fisher).log_normalizer

    def parts():
        kappa = eta.norm(dim=-1)
        return eta / kappa[:, None], kappa, log_normalizer(kappa, DIM)

    def ours():
        mean, kappa, normalizer = parts()
        kernel = Logarithm if logarithmic else Linear
        loss = PairScore(image, mean, slope=kappa, column=normalizer, kernel=kernel).info_nce()
        return [loss.detach().cpu(), torch.autograd.grad(loss, eta)[0].abs().sum().cpu()]

    def textbook():
        mean, kappa, normalizer = parts()
        dot = image @ mean.T
        score = kappa * (torch.log1p(dot.clamp_min(-1 + 1e-6)) if logarithmic else dot) + normalizer
        target = torch.arange(len(score), device=device)
        loss = (F.cross_entropy(score, target) + F.cross_entropy(score.T, target)) / 2
        return [loss.detach().cpu(), torch.autograd.grad(loss, eta)[0].abs().sum().cpu()]

    return Case(ours, textbook, flops=4.0 * batch**2 * DIM, memory=True)  # one product forward, one backward


def pairwise(device):
    """ProLIP's scores of 1,024 x 1,024 pairs, D = 512, with gradients: separated, against tensors of B x B x D."""
    generator = torch.Generator().manual_seed(0)
    mean = F.normalize(torch.randn(2, 1024, DIM, generator=generator), dim=-1)
    log_variance = torch.randn(2, 1024, DIM, generator=generator) - 8
    mean, log_variance = (x.to(device).requires_grad_() for x in (mean, log_variance))
    truth, group = torch.eye(1024, device=device), torch.arange(1024, device=device)

    def with_gradients(loss):
        return [loss.detach().cpu(), *(x.sum().cpu() for x in torch.autograd.grad(loss, (mean, log_variance)))]

    def ours():
        row, column = -log_variance.exp().sum(dim=-1) / 2
        return with_gradients(PairScore(*mean, row=row, column=column).pairwise_sigmoid(group) / 1024**2)

    def textbook():
        spread = (log_variance[0, :, None].exp() + log_variance[1].exp()).sum(dim=-1)
        return with_gradients(F.binary_cross_entropy_with_logits(mean[0] @ mean[1].T - spread / 2, truth))

    return Case(ours, textbook, flops=6.0 * 1024**2 * DIM, memory=True)


def sigmoid(device):
    """Pairwise sigmoid of 2,048 ProLIP pairs, D = 512, frozen means, with gradients: in tiles, against autograd."""
    generator = torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(2, 2048, DIM, generator=generator), dim=-1).to(device)
    slope, offset = (torch.tensor(x, device=device).requires_grad_() for x in (14.3, -10.0))
    row = torch.randn(2048, generator=generator).to(device).requires_grad_()
    group = torch.randint(2**62, (2048,), generator=generator).to(device)

    def with_gradients(loss):
        return [loss.detach().cpu(), *(x.sum().cpu() for x in torch.autograd.grad(loss / 2048, (slope, offset, row)))]

    def ours():
        score = PairScore(image, text, slope=slope, column=offset + row, row=row)
        return with_gradients(score.pairwise_sigmoid(group))

    def textbook():
        score = slope * (image @ text.T) + offset + row + row[:, None]
        match = (group[:, None] == group).float()
        return with_gradients(F.binary_cross_entropy_with_logits(score, match, reduction="sum"))

    return Case(ours, textbook, flops=2.0 * 2048**2 * DIM, memory=True)


def _info_nce(family, batch):
    case = update_wrapper(partial(info_nce, family=family, batch=batch), info_nce)
    case.__doc__ = info_nce.__doc__.format(family=family.capitalize(), batch=f"{batch:,}")
    return case


CASES = {
    "loss_vmf": _info_nce("von Mises-Fisher", 2048),
    "loss_ps": _info_nce("power spherical", 2048),
    "loss_vmf_8192": _info_nce("von Mises-Fisher", 8192),
    "loss_ps_8192": _info_nce("power spherical", 8192),
    "pairwise": pairwise,
    "sigmoid": sigmoid,
}
