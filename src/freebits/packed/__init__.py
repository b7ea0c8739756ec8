"""The packed checkpoint: history and recipes, what reads it and what writes it. Knows no model by name."""

from freebits.packed.manifest import MANIFEST, is_packed, sizes_before
from freebits.packed.packing import HISTORY, history_of, pack_into
from freebits.packed.piece import stage
from freebits.packed.presets import bits_back, canonical, chosen
from freebits.packed.reader import PackedFolder
from freebits.packed.unpacking import SLICED_IN, unpack_into

__all__ = [
    "HISTORY",
    "MANIFEST",
    "SLICED_IN",
    "PackedFolder",
    "bits_back",
    "canonical",
    "chosen",
    "history_of",
    "is_packed",
    "pack_into",
    "sizes_before",
    "stage",
    "unpack_into",
]
