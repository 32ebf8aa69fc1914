"""Distributions on the unit sphere, with normalizers exact at the dimensions of embeddings, and on the real line."""

from models.distributions.generalized_gaussian import GeneralizedGaussian
from models.distributions.power_spherical import PowerSpherical
from models.distributions.von_mises_fisher import VonMisesFisher

__all__ = ["GeneralizedGaussian", "PowerSpherical", "VonMisesFisher"]
