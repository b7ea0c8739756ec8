"""The packed checkpoint: history and recipes, what reads it and what writes it. Knows no model by name."""

from freebits.packed.contents import STEM, Contents, announced, digests_of
from freebits.packed.manifest import MANIFEST, is_packed, sizes_before
from freebits.packed.packing import HISTORY, history_of, pack_into, publish
from freebits.packed.piece import Piece, encoded, plain, stage, staged
from freebits.packed.presets import Preset, bits_back, canonical, chosen
from freebits.packed.reader import PackedFolder
from freebits.packed.recipe import Recipe
from freebits.packed.retouching import retouch
from freebits.packed.unpacking import LOW_RANK_IN, SLICED_IN, unpack_into

__all__ = [
    "HISTORY",
    "LOW_RANK_IN",
    "MANIFEST",
    "SLICED_IN",
    "STEM",
    "Contents",
    "PackedFolder",
    "Piece",
    "Preset",
    "Recipe",
    "announced",
    "bits_back",
    "canonical",
    "chosen",
    "digests_of",
    "encoded",
    "history_of",
    "is_packed",
    "pack_into",
    "plain",
    "publish",
    "retouch",
    "sizes_before",
    "stage",
    "staged",
    "unpack_into",
]
