"""The packed checkpoint: its format, packing and unpacking, and the sizes of everything."""

from freebits.packed.format import is_exact, is_packed
from freebits.packed.inspection import inspect
from freebits.packed.packing import pack
from freebits.packed.sites import PackedCheckpoint
from freebits.packed.unpacking import open_packed, unpack

__all__ = ["PackedCheckpoint", "inspect", "is_exact", "is_packed", "open_packed", "pack", "unpack"]
