"""The packed checkpoint: its format, packing and unpacking, and the sizes of everything."""

from freebits.packed.exact import ExactCheckpoint
from freebits.packed.format import is_exact, is_packed
from freebits.packed.inspection import inspect
from freebits.packed.packing import pack
from freebits.packed.unpacking import PackedCheckpoint, unpack, unpacked_tensors

__all__ = [
    "ExactCheckpoint",
    "PackedCheckpoint",
    "inspect",
    "is_exact",
    "is_packed",
    "pack",
    "unpack",
    "unpacked_tensors",
]
