"""The packed checkpoint: its format, packing and unpacking, and the sizes of everything."""

from freebits.packed.format import is_packed
from freebits.packed.inspection import inspect
from freebits.packed.packing import pack
from freebits.packed.unpacking import PackedCheckpoint, unpack, unpacked_tensors

__all__ = ["PackedCheckpoint", "inspect", "is_packed", "pack", "unpack", "unpacked_tensors"]
