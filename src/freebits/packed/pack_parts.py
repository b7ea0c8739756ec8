"""The codecs of sliced and dense models: moved and encoded part by part, with few blocks in memory."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from freebits.errors import CheckpointError
from freebits.execution.progress import Progress
from freebits.execution.work_store import Work
from freebits.models.families import SLICED_PREFIX
from freebits.models.layout import Layout
from freebits.models.table import Architecture, Part, Role, Weight
from freebits.options import CANONICAL, NONE
from freebits.packed.contents import STEM, Contents, announced, digests_of
from freebits.packed.piece import Piece, staged
from freebits.packed.presets import Preset, canonical
from freebits.storage.folder import Checkpoint, Source, is_adapter
from freebits.storage.writer import CheckpointWriter, shard_bytes
from freebits.transforms.expanded import Expanded
from freebits.transforms.paired import Placed, free_pairs
from freebits.transforms.transform import Turn, transform_parts
from freebits.types import FLOATS, TensorSpec

TransformedPart = tuple[Part, Turn, Callable[[], dict[str, Tensor]]]


def pack_parts(
    source: Checkpoint, directory: Path, preset: Preset, stage: str | None, work: Work, progress: Progress
) -> tuple[Contents, Layout]:
    """Write a sliced model with its sites encoded, a dense one with its pairs; also the layout in which it then runs.

    Raises:
        CheckpointError: the codec finds nothing that is free in the model, or the model is not in a dtype it knows.
    """
    architecture = None if is_adapter(source.config) else Architecture.of(source.config, len(source.specs))
    dense = not str(source.config.get("model_type")).startswith(SLICED_PREFIX)
    model: Source = source
    layout = Layout()
    parts = _all_parts(architecture, source)
    if architecture is None or dense:
        preset = _of_dense(preset, source, architecture, parts)
    else:
        model = Expanded(source, architecture)
        parts = architecture.parts
        layout = Layout.of(model.config, architecture)
        _check_floats(model, architecture, preset)
    contents = Contents()
    ranks: dict[int, int] = {}
    encoder = _Encoder.of(preset, model, architecture, stage)
    transform = preset.transform(Placed(model, preset.device), architecture)
    moved = transform_parts(transform, model, parts, encoder.dtype, work, preset.device)
    names = _announced(preset, model, architecture, parts, layout)
    with CheckpointWriter(directory, names, shard_bytes(source), STEM) as writer:
        pieces = work.map("part", encoder, moved)
        for done, (part, (piece, digests)) in enumerate(zip(parts, pieces, strict=True), start=1):
            contents.write(writer, piece, digests)
            made = {name: spec for recipe in piece.recipes for name, spec in recipe.makes.items()}
            ranks |= {s.site: made[s.shortcut.factor].shape[1] for s in part.sublayers if s.shortcut.factor in made}
            progress("packing", "block", done, len(parts))
    if architecture is None or dense:
        return contents, layout
    return contents, Layout(layout.widths, tuple(ranks.get(sub.site) for sub in architecture.sublayers))


def _all_parts(architecture: Architecture | None, source: Source) -> tuple[Part, ...]:
    """Those of the table, and what a dense model has besides; of an adapter each layer."""
    named = architecture.parts if architecture else ()
    known = {name for part in named for name in part.weights}
    layers: dict[str, dict[str, Weight]] = {}
    for name in source.specs:
        if name not in known:
            layer = name.partition(".lora_")[0] if architecture is None else ""
            layers.setdefault(layer, {})[name] = Weight(name, Role.INNER, "", ndim=None)
    return (*named, *(Part(weights) for weights in layers.values()))


def _of_dense(preset: Preset, source: Checkpoint, architecture: Architecture | None, parts: Iterable[Part]) -> Preset:
    """What a codec does to a dense model, or to an adapter."""
    if preset.name != CANONICAL:
        what = "a dense model" if architecture else "an adapter"
        raise CheckpointError(
            f"{source.path} is {what}, of which codec {preset.name} takes nothing: "
            f"{'slice it first, or ' if architecture else ''}pack it with --codec {CANONICAL} or {NONE}"
        )
    if not any(free_pairs(source.specs, architecture, part, dense=True) for part in parts):
        raise CheckpointError(
            f"{source.path} has no heads or layers whose basis is free, as far as freebits knows: pack it with "
            f"--codec {NONE}"
        )
    return canonical(preset.device, dense=True)


@dataclass(frozen=True)
class _Encoder:
    """Encodes and digests a part of a model that was moved; `specs` are what its tensors are rounded to."""

    preset: Preset
    architecture: Architecture | None
    stage: str | None
    specs: Mapping[str, TensorSpec]

    @classmethod
    def of(cls, preset: Preset, model: Source, architecture: Architecture | None, stage: str | None) -> "_Encoder":
        specs = dict(model.specs)
        for sub in (
            architecture.sublayers if architecture else ()
        ):  # a factor is as precise as the shortcut for which it stands
            if sub.shortcut.weight in specs:
                specs[sub.shortcut.factor] = specs[sub.shortcut.weight]
        return cls(preset, architecture, stage, specs)

    def dtype(self, name: str) -> torch.dtype:
        return self.specs[name].dtype

    def __call__(self, moved_part: TransformedPart) -> tuple[Piece, dict[str, str]]:
        part, turn, moved = moved_part
        tensors = moved()
        here = {name: TensorSpec(self.specs[name].code, tuple(tensor.shape)) for name, tensor in tensors.items()}
        notes = tuple(
            {"site": site, "name": _owner(self.architecture, site, self.specs), "reason": why}
            for site, why in turn.reasons.items()
            if self.architecture is not None
        )
        piece = staged(
            Piece(notes=notes) + self.preset.encode(self.architecture, part, turn, tensors, here), self.stage
        )
        return piece, digests_of(piece)


def _owner(architecture: Architecture, site: int, specs: Mapping[str, TensorSpec]) -> str:
    """Where a site's rotation goes: the sublayer that leads to it, or for site 0 the layer that reads it."""
    return architecture.sublayers[site - 1].name if site else architecture.sublayers[0].first_read(specs).name


def _announced(
    preset: Preset, model: Source, architecture: Architecture | None, parts: Iterable[Part], layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Everything that may be stored: what is planned, and what it is made of, should a code decline it."""
    shapes = {name: spec.shape for name, spec in model.specs.items()}
    moved = shapes
    if architecture is not None and layout.widths:
        moved = preset.layout(architecture, layout).shapes(architecture, shapes)
    code = next((spec.code for spec in model.specs.values() if spec.code in FLOATS), "F32")
    specs = {name: TensorSpec(code, shape) for name, shape in moved.items()}
    planned = dict(model.specs)
    for part in parts:
        planned |= preset.plan(architecture, part, specs)
    return announced(planned)


def _check_floats(model: Source, architecture: Architecture, preset: Preset) -> None:
    codes = {name: model.specs[name].code for name in architecture.weights if name in model.specs}
    for name, code in codes.items():
        if code not in FLOATS:
            raise CheckpointError(f"tensor {name} is {code}, which cannot be rotated: slice the dense model again")
    if not {*codes.values()} & {*preset.floats}:
        found, needed = " and ".join(sorted({*codes.values()})), " or ".join(preset.floats)
        raise CheckpointError(
            f"{model.config.get('model_type')} model of {found}; this codec needs {needed}: slice with --dtype"
        )
