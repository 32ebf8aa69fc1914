"""Distributions on the unit sphere, with exact normalizers in high dimensions, and on the real line."""

from models.distributions.generalized_gaussian import GeneralizedGaussian
from models.distributions.power_spherical import PowerSpherical
from models.distributions.von_mises_fisher import VonMisesFisher

__all__ = ["GeneralizedGaussian", "PowerSpherical", "VonMisesFisher"]
