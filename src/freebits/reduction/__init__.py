"""Reduced-order modelling: how to make a layer narrow, and how narrow. Matrices and numbers, no models."""

from freebits.reduction.low_rank import n_numbers, rank_for, reduced, spectrum
from freebits.reduction.ranks import allocated

__all__ = ["allocated", "n_numbers", "rank_for", "reduced", "spectrum"]
