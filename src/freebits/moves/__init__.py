"""Moves: from one model to another, each with its fidelity. Slicing is lossy, the others keep the function."""

from freebits.moves.canonical import Canonical
from freebits.moves.diagonal import Diagonal
from freebits.moves.expanded import Expanded
from freebits.moves.move import BIT_EXACT, FUNCTION_PRESERVING, LOSSY, Move, Turn, moved_parts
from freebits.moves.paired import Pairs, free_pairs
from freebits.moves.placed import Placed
from freebits.moves.slicing import Slice, folded_part, sliced_size

__all__ = [
    "BIT_EXACT",
    "FUNCTION_PRESERVING",
    "LOSSY",
    "Canonical",
    "Diagonal",
    "Expanded",
    "Move",
    "Pairs",
    "Placed",
    "Slice",
    "Turn",
    "folded_part",
    "free_pairs",
    "moved_parts",
    "sliced_size",
]
