"""Codes: words and bits. Each is one object, encode above decode; they know nothing about models."""

from freebits.codes.bitsback import BitsBack
from freebits.codes.code import Code, Coded, Declined, Params
from freebits.codes.columns import Columns
from freebits.codes.entropy import Entropy
from freebits.codes.grid import Grid
from freebits.codes.integers import Integers
from freebits.codes.joined import Joined
from freebits.codes.pivots import Pivots, identity_columns
from freebits.codes.pyramid import Pyramid
from freebits.codes.rotated import Hadamard
from freebits.codes.rotation_words import canonical_direction
from freebits.codes.transposed import Transposed
from freebits.codes.triangles import Lower, Symmetric

CODES: dict[str, Code] = {
    "lower": Lower(),
    "symmetric": Symmetric(),
    "bits-back": BitsBack(),
    "columns": Columns(),
    "entropy": Entropy(),
    "grid": Grid(),
    "hadamard": Hadamard(),
    "integers": Integers(),
    "joined": Joined(),
    "pivots": Pivots(),
    "pyramid": Pyramid(),
    "transposed": Transposed(),
}
"""Name in a recipe → code."""

__all__ = [
    "CODES",
    "BitsBack",
    "Code",
    "Coded",
    "Columns",
    "Declined",
    "Entropy",
    "Grid",
    "Hadamard",
    "Integers",
    "Joined",
    "Lower",
    "Params",
    "Pivots",
    "Pyramid",
    "Symmetric",
    "Transposed",
    "canonical_direction",
    "identity_columns",
]
