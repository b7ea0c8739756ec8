"""Sizes before there are any files: what each form would store, planned from the kinds of its tensors.

Words are counted in the convention that reproduces the paper's Table 1 in every digit: 16 bits each; all matrices,
biases, embeddings and the head; norms left out. Files add a header and, for bits-back, corrections.
"""

from collections.abc import Iterable, Mapping

from freebits.models.layout import Layout
from freebits.models.table import Architecture, Role
from freebits.packed.presets import bits_back, canonical
from freebits.types import Kind

WORD_BITS = 16
TYPICAL_ENTROPY = {"F16": 0.85, "BF16": 0.67, "F32": 0.84, "F8_E4M3": 0.83, "I8": 0.91, "I32": 0.93, "U8": 0.95}
"""What the entropy stage leaves of weights, measured on several models; see `docs/measurements.md`."""

Kinds = Mapping[str, Kind]


def planned_forms(
    architecture: Architecture, dense: Mapping[str, tuple[int, ...]], size: int, code: str
) -> dict[str, dict[str, Kind] | None]:
    """What a model would store in each of its forms.

    Args:
        architecture: of the dense model.
        dense: shapes of the dense model's tensors.
        size: `k`, the width of a sliced site.
        code: safetensors dtype of the weights.

    Returns:
        `dense` (ties counted once), `dense_untied`, `dense_canonical` (pairs in their canonical form), `sliced`,
        `bits_back` (signs included, no corrections), `canonical` and `canonical_tied` (None for a model without ties);
        stored tensor → kind.
    """
    untied, tied = architecture.with_tie(False), architecture.with_tie(True)
    head, embedding = architecture.head.weight, architecture.embedding.weight
    rows = Layout().weights(architecture)
    once = {name: Kind(code, shape) for name, shape in dense.items() if name in rows}
    forms: dict[str, dict[str, Kind] | None] = {"dense": once, "dense_untied": {head: once[embedding], **once}}
    of_pairs = canonical(dense=True)
    pairs = (of_pairs.plan(architecture, part, once) for part in architecture.with_tie(False).parts)
    forms["dense_canonical"] = {name: kind for part in pairs for name, kind in part.items()}
    for form, preset, of in (
        ("sliced", None, untied),
        ("bits_back", bits_back(0.0), untied),
        ("canonical", canonical(), untied),
        ("canonical_tied", canonical(), tied if architecture.tied else None),
    ):
        if of is None:
            forms[form] = None
            continue
        layout = Layout.sliced(of, size)
        moved = preset.layout(of, layout) if preset else layout
        kinds = {name: Kind(code, shape) for name, shape in moved.shapes(of, dense).items()}
        parts = (preset.plan(of, part, kinds) if preset else {} for part in of.parts)
        forms[form] = {name: kind for part in parts for name, kind in part.items()} if preset else kinds
    return forms


def n_words(architecture: Architecture, stored: Kinds) -> int:
    """Words in the paper's convention: 16 bits each, without norms and what becomes of the final norm's bias."""
    norms = {name for name, weight in architecture.weights.items() if weight.role is Role.NORM}
    left_out = norms | {architecture.head.bias}
    return sum(_words(kind) for name, kind in stored.items() if name not in left_out)


def _words(kind: Kind) -> int:
    return kind.n_bytes * 8 // WORD_BITS if kind.code == "U8" else kind.numel


def n_bytes(stored: Iterable[Kind]) -> int:
    """Bytes of tensors; a file adds its header, a packed folder its manifest."""
    return sum(kind.n_bytes for kind in stored)
