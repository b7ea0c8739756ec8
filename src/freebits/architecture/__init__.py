"""What a model is: its residual stream, the tensors on it, and the sites where a rotation is free."""

from freebits.architecture.families import FAMILIES, Family, dense_family, family_of
from freebits.architecture.sites import Architecture, Axis, Sublayer

__all__ = ["FAMILIES", "Architecture", "Axis", "Family", "Sublayer", "dense_family", "family_of"]
