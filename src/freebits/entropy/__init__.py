"""The bit-exact stage: bytes in, fewer bytes out, the same bytes back. Knows dtypes, nothing about models."""

from freebits.entropy.stage import compress, decompress

__all__ = ["compress", "decompress"]
