"""The codes that a recipe of a packed folder can name; see `freebits.packed.recipe`."""

from freebits.codecs.added import Added
from freebits.codecs.base import Code
from freebits.codecs.bits_back import BitsBack
from freebits.codecs.columns import Columns
from freebits.codecs.delta import Delta
from freebits.codecs.entropy import Entropy
from freebits.codecs.hadamard import Hadamard
from freebits.codecs.integers import Integers
from freebits.codecs.pivots import Pivots
from freebits.codecs.pyramid import Pyramid
from freebits.codecs.rearranging import Joined, Transposed
from freebits.codecs.triangles import Lower, Symmetric

CODES: dict[str, Code] = {
    "added": Added(),
    "lower": Lower(),
    "symmetric": Symmetric(),
    "bits-back": BitsBack(),
    "columns": Columns(),
    "delta": Delta(),
    "entropy": Entropy(),
    "hadamard": Hadamard(),
    "integers": Integers(),
    "joined": Joined(),
    "pivots": Pivots(),
    "pyramid": Pyramid(),
    "transposed": Transposed(),
}
"""Name in a recipe → code."""
