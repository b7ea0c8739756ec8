"""Words and bits: the bits-back code of one site. Knows nothing about models."""

from freebits.coding.bitsback import Coded, Declined, decode, encode, message_length
from freebits.coding.canonical import canonical_direction
from freebits.coding.rotation import n_words_taken

__all__ = ["Coded", "Declined", "canonical_direction", "decode", "encode", "message_length", "n_words_taken"]
