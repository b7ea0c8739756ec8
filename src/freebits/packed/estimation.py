"""Count words before there are any: what each step would store, from shapes alone.

The convention is the one that reproduces the paper's Table 1 in every digit: 16-bit words; all matrices, biases,
embeddings and the head; norms left out. Files add a header and, for bits-back, corrections.
"""

from collections.abc import Mapping
from itertools import pairwise
from math import prod

from freebits.architecture import Architecture
from freebits.coding import message_length

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
    embedding = prod(shapes[f"{architecture.family.embeddings[0]}.weight"])
    head = {f"{architecture.family.head}.weight": (embedding // D, D)}
    untied = {name: shape for name, shape in (head | dict(shapes)).items() if name in architecture.axes}
    dense_untied = sum(prod(shape) for shape in untied.values())
    sliced = _sliced(architecture, untied, sizes)
    triangle = k * (k - 1) // 2  # what a triangular block of the embedding saves at site 0
    canonical = sliced - triangle - sum(_canonical_gain(before, after, D) for before, after in pairwise(sizes))
    # ties kept: the head is the dense embedding, and two factors make both sliced ones of it
    tied = canonical + triangle - embedding // D * k + D * k + D * D
    return {
        "dense": dense_untied - (embedding if architecture.tied else 0),
        "dense_untied": dense_untied,
        "sliced": sliced,
        "bits_back": sliced - sum(-message_length(0, size) - -(-size // WORD_BITS) for size in sizes[1:]),
        "canonical": canonical,
        "canonical_tied": tied if architecture.tied else None,
    }


def _sliced(architecture: Architecture, dense: Mapping[str, tuple[int, ...]], sizes: tuple[int, ...]) -> int:
    """Words of the sliced model, shortcuts included."""
    total = sum(before * after for before, after in pairwise(sizes))
    for name, shape in dense.items():
        at_site = {axis.dim: sizes[axis.site] for axis in architecture.axes[name]}
        total += prod(at_site.get(dim, size) for dim, size in enumerate(shape))
    return total


def _canonical_gain(before: int, after: int, dense_size: int) -> int:
    """Words of a shortcut less those of its canonical form: nothing at the last site, else the cheaper of M and P."""
    if after == dense_size:
        return before * after
    removed = dense_size - before
    factor = before * removed - removed * (removed - 1) // 2
    return before * after - min(factor, before * (before + 1) // 2)
