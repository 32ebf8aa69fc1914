"""Distributions on the unit sphere, with normalizers that are exact at the dimensions of embeddings."""

from models.distributions.power_spherical import PowerSpherical
from models.distributions.von_mises_fisher import VonMisesFisher

__all__ = ["PowerSpherical", "VonMisesFisher"]
