"""Codes: words and bits. Each is one object, encode above decode; they know nothing about models."""

from freebits.codes.bitsback import BitsBack, canonical_direction
from freebits.codes.code import Code, Coded, Declined, Params
from freebits.codes.entropy import Entropy
from freebits.codes.integers import Integers
from freebits.codes.triangles import Lower, Symmetric

CODES: dict[str, Code] = {
    "lower": Lower(),
    "symmetric": Symmetric(),
    "bits-back": BitsBack(),
    "entropy": Entropy(),
    "integers": Integers(),
}
"""Name in a recipe → code."""

__all__ = [
    "CODES",
    "BitsBack",
    "Code",
    "Coded",
    "Declined",
    "Entropy",
    "Integers",
    "Lower",
    "Params",
    "Symmetric",
    "canonical_direction",
]
