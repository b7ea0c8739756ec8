"""Count words before there are any: what each step would store, from shapes alone.

The convention is the one that reproduces the paper's Table 1 in every digit: 16-bit words; all matrices, biases,
embeddings and the head; norms left out. Files add a header and, for bits-back, corrections.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import prod

from freebits.architecture import Architecture
from freebits.coding import message_length, n_lower_words

WORD_BITS = 16


def word_counts(
    architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], sliced_size: int
) -> dict[str, int | None]:
    """Words of a model in each of its forms.

    Args:
        architecture: of the dense model.
        shapes: of the dense model's tensors.
        sliced_size: `k`.

    Returns:
        `dense` (ties counted once), `dense_untied`, `sliced`, `bits_back` (signs included, no corrections),
        `canonical` and `canonical_tied` (None for a model without ties).
    """
    D, k = architecture.hidden_size, sliced_size
    sizes = architecture.site_sizes(k)
    embedding = shapes[architecture.embedding]
    untied, tied = replace(architecture, tied=False), replace(architecture, tied=True)
    all_shapes = {architecture.head: embedding, architecture.embedding_factor: (D, D), **shapes}
    dense_untied = sum(prod(shape) for name, shape in all_shapes.items() if name in untied.axes)
    sliced = _sliced(untied, all_shapes, sizes)
    n_rows = shapes[f"{architecture.blocks[0][0].reads[0]}.weight"][0]
    triangle = n_rows * k - n_lower_words(n_rows, k)  # saved in the first matrix that reads site 0
    gains = [_canonical_gain(before, after, D) for before, after in pairwise(sizes)]
    return {
        "dense": dense_untied - (prod(embedding) if architecture.tied else 0),
        "dense_untied": dense_untied,
        "sliced": sliced,
        "bits_back": sliced - sum(-message_length(0, size) - -(-size // WORD_BITS) for size in sizes[1:]),
        "canonical": sliced - triangle - sum(gains),
        "canonical_tied": _sliced(tied, all_shapes, sizes) - triangle - sum(gains[:-1]) if architecture.tied else None,
    }


def _sliced(architecture: Architecture, dense: Mapping[str, tuple[int, ...]], sizes: tuple[int, ...]) -> int:
    """Words of the sliced model, shortcuts included, a tied head's norm left out."""
    total = sum(before * after for before, after in pairwise(sizes))
    for name, shape in dense.items():
        if name not in architecture.axes or name.startswith(f"{architecture.family.final_norm}."):
            continue
        at_site = {axis.dim: sizes[axis.site] for axis in architecture.axes[name]}
        total += prod(at_site.get(dim, size) for dim, size in enumerate(shape))
    return total


def _canonical_gain(before: int, after: int, dense_size: int) -> int:
    """Words of a shortcut `(before, after)` less those of its canonical form, a factor of rank `dense_size - after`."""
    return before * after - n_lower_words(before, min(before, dense_size - after))
