"""The normalizers of distributions on the sphere."""

import numpy as np
import torch
from scipy import special

from benchmarks.measure import Case
from models.distributions import power_spherical, von_mises_fisher


def normalizers(device):
    """Both log normalizers of 100,000 kappas at D = 512, with gradients: ours, against scipy's special functions."""
    kappa = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).mul(500).to(device).requires_grad_()

    def ours():
        total = von_mises_fisher.log_normalizer(kappa, 512) + power_spherical.log_normalizer(kappa, 512)
        torch.autograd.grad(total.sum(), kappa)

    def textbook():
        k = kappa.detach().cpu().double().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):  # the Bessel function is 0 below kappa = 13
            order = np.log(special.ive(255, k)) + k
            special.ive(256, k) / special.ive(255, k)
        a = 255.5
        a * np.log(k) - order, special.gammaln(2 * a + k) - special.gammaln(a + k)
        special.digamma(2 * a + k) - special.digamma(a + k)

    return Case(ours, textbook)


CASES = {"normalizers": normalizers}
