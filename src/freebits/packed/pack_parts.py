"""Pack a sliced model, a dense model or an adapter with a codec that transforms it.

The model is transformed and encoded part by part, so that only a few blocks are in memory. A part has the embeddings,
one block, the head, or all other tensors; for an adapter, it has one layer.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from freebits.errors import CheckpointError
from freebits.execution.progress import Progress
from freebits.execution.work_store import Work
from freebits.models.architecture import Architecture, Part, Role, Weight
from freebits.models.families import SLICED_PREFIX
from freebits.models.layout import Layout
from freebits.options import CANONICAL, NONE
from freebits.packed.contents import STEM, Contents, announced, digested
from freebits.packed.encoded_piece import Piece, staged
from freebits.packed.presets import Preset, canonical
from freebits.storage.checkpoint import Checkpoint, Source, is_adapter
from freebits.storage.writer import CheckpointWriter
from freebits.transforms.dense_shortcuts import DenseShortcutView
from freebits.transforms.paired import DeviceView, free_pairs
from freebits.transforms.transform import PartChange, transform_parts
from freebits.types import FLOATS, TensorSpec

_TransformedPart = tuple[Part, PartChange, Callable[[], dict[str, Tensor]]]


def pack_parts(
    source: Checkpoint, directory: Path, preset: Preset, stage: str | None, work: Work, progress: Progress
) -> tuple[Contents, Layout]:
    """Transform and encode a model, and write the encoded tensors.

    Returns:
        The contents, and the layout of the packed model.

    Raises:
        CheckpointError: the codec cannot make the model smaller, or does not encode its dtypes.
        UnsupportedModelError: see `family_of`.
    """
    architecture = None if is_adapter(source.config) else Architecture.of(source.config, len(source.specs))
    dense = not str(source.config.get("model_type")).startswith(SLICED_PREFIX)
    model: Source = source
    layout = Layout()
    parts = _all_parts(architecture, source)
    if architecture is None or dense:
        preset = _dense_preset(preset, source, architecture, parts)
    else:
        model = DenseShortcutView(source, architecture)
        parts = architecture.parts
        layout = Layout.of(model.config, architecture)
        _check_floats(model, architecture, preset)
    contents = Contents()
    ranks: dict[int, int] = {}
    encoder = _Encoder.of(preset, model, architecture, stage)
    transform = preset.transform(DeviceView(model, preset.device), architecture)
    transformed_parts = transform_parts(transform, model, parts, encoder.dtype, work, preset.device)
    names = _announced_names(preset, model, architecture, parts, layout)
    with CheckpointWriter(directory, names, source.shard_bytes, STEM) as writer:
        pieces = work.map("part", encoder, transformed_parts)
        for done, (part, (piece, digests)) in enumerate(zip(parts, pieces, strict=True), start=1):
            contents.write(writer, piece, digests)
            specs = {name: spec for recipe in piece.recipes for name, spec in recipe.makes.items()}
            subs = [sub for sub in part.sublayers if sub.shortcut.factor in specs]
            ranks |= {sub.site: specs[sub.shortcut.factor].shape[1] for sub in subs}
            progress("packing", "block", done, len(parts))
    if architecture is None or dense:
        return contents, layout
    return contents, Layout(layout.widths, tuple(ranks.get(sub.site) for sub in architecture.sublayers))


def _all_parts(architecture: Architecture | None, source: Source) -> tuple[Part, ...]:
    """Return the parts of the architecture and one part with all other tensors; for an adapter, one part per layer."""
    parts = architecture.parts if architecture else ()
    part_names = {name for part in parts for name in part.weights}
    layers: dict[str, dict[str, Weight]] = {}
    for name in source.specs:
        if name not in part_names:
            layer = name.partition(".lora_")[0] if architecture is None else ""
            layers.setdefault(layer, {})[name] = Weight(name, Role.INNER, "", ndim=None)
    return (*parts, *(Part(weights) for weights in layers.values()))


def _dense_preset(
    preset: Preset, source: Checkpoint, architecture: Architecture | None, parts: Iterable[Part]
) -> Preset:
    """Return the preset for a dense model or an adapter.

    Raises:
        CheckpointError: the codec cannot make the model or the adapter smaller.
    """
    if preset.name != CANONICAL:
        kind, advice = ("a dense model", "slice the model first, or ") if architecture else ("an adapter", "")
        raise CheckpointError(
            f"{source.path} is {kind}, which codec {preset.name} does not encode: "
            f"{advice}set `codec` to {CANONICAL} or {NONE}"
        )
    if not any(free_pairs(source.specs, architecture, part, dense=True) for part in parts):
        raise CheckpointError(
            f"{source.path} has no attention heads or low-rank layers that codec {preset.name} can make smaller: "
            f"set `codec` to {NONE}"
        )
    return canonical(preset.device, dense=True)


@dataclass(frozen=True)
class _Encoder:
    """Encodes a transformed part of a model, and computes the digests of the stored tensors.

    Attributes:
        preset: preset of the codec.
        architecture: architecture of the model; None for an adapter.
        stage: code of the entropy stage; None if tensors are not entropy-coded.
        specs: name → spec before the transform. The transformed tensor is rounded to the dtype of this spec.
    """

    preset: Preset
    architecture: Architecture | None
    stage: str | None
    specs: Mapping[str, TensorSpec]

    @classmethod
    def of(cls, preset: Preset, model: Source, architecture: Architecture | None, stage: str | None) -> "_Encoder":
        specs = dict(model.specs)
        for sub in architecture.sublayers if architecture else ():
            if sub.shortcut.weight in specs:  # a factor has the dtype of the shortcut that it replaces
                specs[sub.shortcut.factor] = specs[sub.shortcut.weight]
        return cls(preset, architecture, stage, specs)

    def dtype(self, name: str) -> torch.dtype:
        return self.specs[name].dtype

    def __call__(self, transformed_part: _TransformedPart) -> tuple[Piece, dict[str, str]]:
        part, change, load_tensors = transformed_part
        tensors = load_tensors()
        specs = {name: TensorSpec(self.specs[name].dtype_name, tuple(tensor.shape)) for name, tensor in tensors.items()}
        notes = tuple(
            {"site": site, "name": _module_name(self.architecture, site, self.specs), "reason": reason}
            for site, reason in change.reasons.items()
            if self.architecture is not None
        )
        piece = Piece(notes=notes) + self.preset.encode(self.architecture, part, change, tensors, specs)
        piece = staged(piece, self.stage)
        return digested(piece)


def _module_name(architecture: Architecture, site: int, specs: Mapping[str, TensorSpec]) -> str:
    """Return the name of the sublayer that leads to a site; for site 0, of the layer that reads the stream there."""
    return architecture.sublayers[site - 1].name if site else architecture.sublayers[0].first_read(specs).name


def _announced_names(
    preset: Preset, model: Source, architecture: Architecture | None, parts: Iterable[Part], layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Return the longest name and shape of each tensor that may be stored.

    The result has the encoded tensors that the codec plans, and also the plain tensors, because a code can decline to
    encode them.
    """
    shapes = {name: spec.shape for name, spec in model.specs.items()}
    if architecture is not None and layout.widths:
        shapes = preset.layout(architecture, layout).shapes(architecture, shapes)
    dtype_name = next((spec.dtype_name for spec in model.specs.values() if spec.dtype_name in FLOATS), "F32")
    specs = {name: TensorSpec(dtype_name, shape) for name, shape in shapes.items()}
    planned = dict(model.specs)
    for part in parts:
        planned |= preset.plan(architecture, part, specs)
    return announced(planned)


def _check_floats(model: Source, architecture: Architecture, preset: Preset) -> None:
    """Check that all tensors of the architecture are floats, and that the codec encodes the dtype of at least one."""
    dtype_names = {name: model.specs[name].dtype_name for name in architecture.weights if name in model.specs}
    for name, dtype_name in dtype_names.items():
        if dtype_name not in FLOATS:
            raise CheckpointError(
                f"tensor {name} has dtype {dtype_name}, but only floats can be rotated: slice the dense model again"
            )
    if not {*dtype_names.values()} & {*preset.floats}:
        actual, accepted = " and ".join(sorted({*dtype_names.values()})), " or ".join(preset.floats)
        raise CheckpointError(
            f"the {model.config.get('model_type')} model has dtype {actual}, but codec {preset.name} encodes "
            f"{accepted}: slice the dense model again with another `dtype`"
        )
