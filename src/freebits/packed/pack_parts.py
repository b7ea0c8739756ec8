"""The codecs of sliced models: moved and encoded part by part, with few blocks in memory."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from freebits.architecture import Architecture, Layout, Part
from freebits.checkpoint import Checkpoint, CheckpointWriter, shard_bytes
from freebits.errors import CheckpointError
from freebits.kind import FLOATS, Kind
from freebits.moves import Expanded, Turn, moved_parts
from freebits.packed.contents import STEM, Contents, announced, digests_of
from freebits.packed.piece import Piece, staged
from freebits.packed.presets import Preset
from freebits.work import Crew, Progress

Work = tuple[Part, Turn, Callable[[], dict[str, Tensor]]]


def pack_parts(
    source: Checkpoint, directory: Path, preset: Preset, stage: str | None, crew: Crew, progress: Progress
) -> tuple[Contents, Layout]:
    """Write a sliced model with its sites encoded; also the layout in which it then runs.

    Raises:
        CheckpointError: the model is not sliced, or not in a dtype that the codec knows.
    """
    architecture = Architecture.of(source.config, len(source.kinds))
    if source.config.get("model_type") != architecture.family.sliced_model_type:
        raise CheckpointError(
            f"{source.path} is a dense model, whose shortcuts leave no rotation free: slice it first, "
            "or pack it byte for byte with --codec none"
        )
    model = Expanded(source, architecture)
    _check_floats(model, architecture, preset)
    contents = Contents()
    ranks: dict[int, int] = {}
    layout = Layout.of(model.config, architecture)
    encoder = _Encoder.of(preset, model, architecture, stage)
    moved = moved_parts(preset.move(model, architecture), model, architecture, encoder.dtype, crew)
    pieces = crew.give("part", encoder, moved)
    if not crew.leads:
        for _ in pieces:
            pass
        return contents, layout
    names = _announced(preset, model, architecture, layout)
    with CheckpointWriter(directory, names, shard_bytes(source), STEM) as writer, closing(pieces):
        for done, (part, (piece, digests)) in enumerate(zip(architecture.parts, pieces, strict=True), start=1):
            contents.write(writer, piece, digests)
            made = {name: kind for recipe in piece.recipes for name, kind in recipe.makes.items()}
            ranks |= {s.site: made[s.shortcut.factor].shape[1] for s in part.sublayers if s.shortcut.factor in made}
            progress(done, len(architecture.parts))
    return contents, Layout(layout.widths, tuple(ranks.get(sub.site) for sub in architecture.sublayers))


@dataclass(frozen=True)
class _Encoder:
    """Encodes and digests a part of a sliced model that was moved; `kinds` are what its tensors are rounded to."""

    preset: Preset
    architecture: Architecture
    stage: str | None
    kinds: Mapping[str, Kind]

    @classmethod
    def of(cls, preset: Preset, model: Expanded, architecture: Architecture, stage: str | None) -> "_Encoder":
        kinds = dict(model.kinds)
        for sub in architecture.sublayers:  # a factor is as precise as the shortcut for which it stands
            kinds[sub.shortcut.factor] = kinds[sub.shortcut.weight]
        return cls(preset, architecture, stage, kinds)

    def dtype(self, name: str) -> torch.dtype:
        return self.kinds[name].dtype

    def __call__(self, work: Work) -> tuple[Piece, dict[str, str]]:
        part, turn, moved = work
        tensors = moved()
        here = {name: Kind(self.kinds[name].code, tuple(tensor.shape)) for name, tensor in tensors.items()}
        notes = tuple(
            {"site": site, "name": _owner(self.architecture, site, self.kinds), "reason": why}
            for site, why in turn.reasons.items()
        )
        piece = staged(Piece(notes=notes) + self.preset.encode(part, turn, tensors, here), self.stage)
        return piece, digests_of(piece)


def _owner(architecture: Architecture, site: int, kinds: Mapping[str, Kind]) -> str:
    """Where a site's rotation goes: the sublayer that leads to it, or for site 0 the layer that reads it."""
    return architecture.sublayers[site - 1].name if site else architecture.sublayers[0].first_read(kinds).name


def _announced(
    preset: Preset, model: Expanded, architecture: Architecture, layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Everything that may be stored: what is planned, and what it is made of, should a code decline it."""
    shapes = {name: kind.shape for name, kind in model.kinds.items()}
    moved = preset.layout(architecture, layout).shapes(architecture, shapes)
    kinds = {name: Kind(model.kinds[architecture.embedding.weight].code, shape) for name, shape in moved.items()}
    planned = dict(model.kinds)
    for part in architecture.parts:
        planned |= preset.plan(part, kinds, architecture.free_sites)
    return announced(planned)


def _check_floats(model: Expanded, architecture: Architecture, preset: Preset) -> None:
    codes = {name: model.kinds[name].code for name in architecture.weights if name in model.kinds}
    for name, code in codes.items():
        if code not in FLOATS:
            raise CheckpointError(f"tensor {name} is {code}, which cannot be rotated: slice the dense model again")
    if not {*codes.values()} & {*preset.floats}:
        found, needed = " and ".join(sorted({*codes.values()})), " or ".join(preset.floats)
        raise CheckpointError(
            f"{model.config.get('model_type')} model of {found}; this codec needs {needed}: slice with --dtype"
        )
