"""Sizes before there are any files: what each form would store, planned from the kinds of its tensors.

Words are counted in the convention that reproduces the paper's Table 1 in every digit: 16 bits each; all matrices,
biases, embeddings and the head; norms left out. Files add a header and, for bits-back, corrections.
"""

from collections.abc import Iterable, Mapping

from freebits.models.layout import Layout
from freebits.models.table import Architecture, Role
from freebits.packed.presets import bits_back, canonical
from freebits.types import TensorSpec

VALUE_BITS = 16
TYPICAL_ENTROPY = {"F16": 0.85, "BF16": 0.67, "F32": 0.84, "F8_E4M3": 0.83, "I8": 0.91, "I32": 0.93, "U8": 0.95}
"""What the entropy stage leaves of weights, measured on several models; see `docs/measurements.md`."""

Specs = Mapping[str, TensorSpec]


def planned_forms(
    architecture: Architecture, dense: Mapping[str, tuple[int, ...]], size: int, code: str
) -> dict[str, dict[str, TensorSpec] | None]:
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
    once = {name: TensorSpec(code, shape) for name, shape in dense.items() if name in rows}
    forms: dict[str, dict[str, TensorSpec] | None] = {"dense": once, "dense_untied": {head: once[embedding], **once}}
    of_pairs = canonical(dense=True)
    pairs = (of_pairs.plan(architecture, part, once) for part in architecture.with_tie(False).parts)
    forms["dense_canonical"] = {name: spec for part in pairs for name, spec in part.items()}
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
        specs = {name: TensorSpec(code, shape) for name, shape in moved.shapes(of, dense).items()}
        parts = (preset.plan(of, part, specs) if preset else {} for part in of.parts)
        forms[form] = {name: spec for part in parts for name, spec in part.items()} if preset else specs
    return forms


def n_values(architecture: Architecture, stored: Specs) -> int:
    """Words in the paper's convention: 16 bits each, without norms and what becomes of the final norm's bias."""
    norms = {name for name, weight in architecture.weights.items() if weight.role is Role.NORM}
    left_out = norms | {architecture.head.bias}
    return sum(_words(spec) for name, spec in stored.items() if name not in left_out)


def _words(spec: TensorSpec) -> int:
    return spec.n_bytes * 8 // VALUE_BITS if spec.code == "U8" else spec.numel


def n_bytes(stored: Iterable[TensorSpec]) -> int:
    """Bytes of tensors; a file adds its header, a packed folder its manifest."""
    return sum(spec.n_bytes for spec in stored)
