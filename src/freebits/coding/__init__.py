"""Words and bits: the bits-back code of one site, triangles as rows of words. Knows nothing about models."""

from freebits.coding.bitsback import Coded, Declined, decode, encode, message_length
from freebits.coding.direction import canonical_direction
from freebits.coding.rotation import n_words_taken
from freebits.coding.triangles import lower_matrix, lower_words, n_lower_words, symmetric_matrix

__all__ = [
    "Coded",
    "Declined",
    "canonical_direction",
    "decode",
    "encode",
    "lower_matrix",
    "lower_words",
    "message_length",
    "n_lower_words",
    "n_words_taken",
    "symmetric_matrix",
]
