"""Words and bits: the bits-back code of one site. Knows nothing about models."""

from freebits.coding.bitsback import Coded, Declined, decode, encode, message_length
from freebits.coding.canonical import canonical_direction

__all__ = ["Coded", "Declined", "canonical_direction", "decode", "encode", "message_length"]
