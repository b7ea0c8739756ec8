"""Estimate the size of each form of a model from the specs of its tensors, before any file exists.

`n_values` counts as arXiv 2410.01309 does, and reproduces all sizes of sliced models in its Table 1. It counts the
16-bit values of matrices, biases, embeddings and the head, but not norms and, with the codec `bits-back`, corrections.
"""

from collections.abc import Iterable, Mapping

from freebits.models.architecture import Architecture, Role
from freebits.models.layout import Layout
from freebits.packed.presets import bits_back, canonical
from freebits.types import TensorSpec

VALUE_BITS = 16
TYPICAL_ENTROPY = {"F16": 0.85, "BF16": 0.67, "F32": 0.84, "F8_E4M3": 0.83, "I8": 0.91, "I32": 0.93, "U8": 0.95}
"""dtype → size after the entropy stage / size before, measured on several models (`docs/measurements.md`)."""

Specs = Mapping[str, TensorSpec]


def planned_forms(
    architecture: Architecture, dense: Mapping[str, tuple[int, ...]], size: int, dtype_name: str
) -> dict[str, dict[str, TensorSpec] | None]:
    """Return the tensors that each form of a model would store.

    Args:
        architecture: architecture of the dense model.
        dense: name → shape, for the tensors of the dense model.
        size: `k`, the width of the residual stream in the sliced model.
        dtype_name: safetensors dtype of the weights.

    Returns:
        Form → name of a stored tensor → tensor spec. The forms are `dense`, `dense_untied`, `dense_canonical` (what the
        codec `canonical` stores of a dense model), `sliced`, `bits_back` (with signs, without corrections), `canonical`
        and `canonical_tied` (None for a model without tied tensors). `dense`, `dense_canonical` and `canonical_tied`
        contain a tied matrix once, the other forms twice.
    """
    untied, tied = architecture.with_tie(False), architecture.with_tie(True)
    head, embedding = architecture.head.weight, architecture.embedding.weight
    weights = Layout().weights(architecture)
    once = {name: TensorSpec(dtype_name, shape) for name, shape in dense.items() if name in weights}
    forms: dict[str, dict[str, TensorSpec] | None] = {"dense": once, "dense_untied": {head: once[embedding], **once}}
    dense_preset = canonical(dense=True)
    plans = (dense_preset.plan(architecture, part, once) for part in untied.parts)
    forms["dense_canonical"] = {name: spec for plan in plans for name, spec in plan.items()}
    for form, preset, variant in (
        ("sliced", None, untied),
        ("bits_back", bits_back(0.0), untied),
        ("canonical", canonical(), untied),
        ("canonical_tied", canonical(), tied if architecture.tied else None),
    ):
        if variant is None:
            forms[form] = None
            continue
        layout = Layout.sliced(variant, size)
        if preset:
            layout = preset.layout(variant, layout)
        specs = {name: TensorSpec(dtype_name, shape) for name, shape in layout.shapes(variant, dense).items()}
        if preset:
            plans = (preset.plan(variant, part, specs) for part in variant.parts)
            specs = {name: spec for plan in plans for name, spec in plan.items()}
        forms[form] = specs
    return forms


def n_values(architecture: Architecture, stored: Specs) -> int:
    """Count 16-bit values as in arXiv 2410.01309: without norms, and without the bias that folding adds to the head."""
    norms = {name for name, weight in architecture.weights.items() if weight.role is Role.NORM}
    excluded = norms | {architecture.head.bias}
    return sum(_n_values(spec) for name, spec in stored.items() if name not in excluded)


def _n_values(spec: TensorSpec) -> int:
    """Count the 16-bit values of a tensor. Two bytes of a bitstream (`U8`) count as one value."""
    return spec.n_bytes * 8 // VALUE_BITS if spec.dtype_name == "U8" else spec.numel


def n_bytes(stored: Iterable[TensorSpec]) -> int:
    """Return the bytes of the tensors, without file headers and manifest."""
    return sum(spec.n_bytes for spec in stored)
