"""What `--codec` stands for: a move, and the codes that take what it leaves redundant."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from freebits.codecs.bits_back import THRESHOLD, BitsBack
from freebits.codecs.code import Code, Declined
from freebits.codecs.pivots import Pivots
from freebits.codecs.registry import CODES
from freebits.errors import UsageError
from freebits.models.layout import Layout
from freebits.models.table import Architecture, Part
from freebits.options import BITS_BACK, CANONICAL, CODECS, NONE
from freebits.packed.piece import Piece, encoded, plain
from freebits.packed.recipe import Recipe
from freebits.transforms.canonical import Canonical
from freebits.transforms.diagonal import Diagonal
from freebits.transforms.paired import Pairs, Placed, free_pairs
from freebits.transforms.transform import Transform, Turn
from freebits.types import CPU, FLOATS, HALVES, TensorSpec

PIVOTS = "pivots"


@dataclass(frozen=True)
class Group:
    """Tensors that one code takes together.

    Attributes:
        site: whose rotation makes them redundant.
        name: where that went: a sublayer, or for site 0 the layer that reads it.
        code: a key of `freebits.codecs.registry.CODES`; empty where none takes them, for a `reason`.
        tensors: their names, in the code's order.
        label: begins the names of what is stored.
        params: parameters to plan sizes with, before encoding.
        reason: why no code takes them.
    """

    site: int
    name: str
    code: str
    tensors: tuple[str, ...] = ()
    label: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Preset:
    """A codec of sliced or of dense models.

    Attributes:
        name: by which users choose it.
        transform: from a sliced model with dense shortcuts, or from a dense one.
        groups: what of a part is encoded together, given the kinds of the tensors that the move leaves.
        pivots: which of a part's tensors have the identity among their columns, with the code for each.
        layout: what the move makes of a layout, for a model of that architecture.
        codes: encoders that replace those of `CODES`.
        floats: dtypes of the tensors that it can encode.
        device: where linear algebra runs.
        facts: its parameters, for the history.
    """

    name: str
    transform: Callable[[Placed, Any], Transform[Any, Any]]
    groups: Callable[[Part, Mapping[str, TensorSpec]], Iterator[Group]]
    pivots: Callable[[Architecture | None, Part, Mapping[str, TensorSpec]], Mapping[str, Pivots]]
    layout: Callable[[Architecture, Layout], Layout]
    codes: Mapping[str, Code]
    floats: tuple[str, ...]
    device: torch.device = CPU
    facts: Mapping[str, Any] = field(default_factory=dict)

    def encode(
        self,
        architecture: Architecture | None,
        part: Part,
        turn: Turn,
        tensors: dict[str, Tensor],
        specs: Mapping[str, TensorSpec],
    ) -> Piece:
        """A part of the moved model, in the codes that take it; `specs` are what its tensors are rounded to."""
        piece = Piece()
        left = dict(tensors)
        for group in self.groups(part, specs):
            if group.site not in turn.rotations:
                continue  # its reason is the move's to tell
            note = {"site": group.site, "name": group.name}
            if not group.code:
                piece += Piece(notes=(note | {"reason": group.reason},))
                continue
            code = self.codes.get(group.code) or CODES[group.code]
            makes = {name: specs[name] for name in group.tensors}
            try:
                piece += encoded(group.code, code, group.label, {n: tensors[n] for n in makes}, makes, note)
                left = {name: tensor for name, tensor in left.items() if name not in makes}
            except Declined as reason:
                piece += Piece(notes=(note | {"reason": str(reason)},))
        for name, code in self.pivots(architecture, part, specs).items():
            if name in left:
                with suppress(Declined):
                    piece += encoded(PIVOTS, code, name, {name: left[name]}, {name: specs[name]})
                    del left[name]
        return piece + plain({name: tensor.to(specs[name].dtype) for name, tensor in left.items()})

    def plan(
        self, architecture: Architecture | None, part: Part, specs: Mapping[str, TensorSpec]
    ) -> dict[str, TensorSpec]:
        """What would be stored for a part, from kinds alone."""
        stored = {name: specs[name] for name in part.weights if name in specs}
        for group in self.groups(part, specs):
            if architecture is not None and group.site in architecture.free_sites and group.code:
                stored = _planned(stored, group.code, group.tensors, group.label, group.params)
        for name, code in self.pivots(architecture, part, specs).items():
            if name in stored:
                stored = _planned(stored, PIVOTS, (name,), name, code.params)
        return stored


def canonical(device: torch.device = CPU, *, dense: bool = False) -> Preset:
    """Choose rotations so that shortcuts need few numbers, bases so that pairs do; a dense model has pairs alone."""
    if dense:
        return Preset(
            CANONICAL, Pairs, lambda *_: iter(()), partial(_identities, dense=True), _as_it_is, {}, FLOATS, device
        )
    return Preset(CANONICAL, Canonical, _triangles, _identities, _projections, {}, FLOATS, device)


def bits_back(threshold: float, device: torch.device = CPU) -> Preset:
    """The paper's code; `threshold` is the largest error of a decoded word that is left without a correction."""
    codes = {BITS_BACK: BitsBack(threshold, device)}
    facts = {"threshold": threshold}
    return Preset(BITS_BACK, Diagonal, _messages, lambda *_: {}, _as_it_is, codes, HALVES, device, facts)


def chosen(codec: str, threshold: float | None = None, device: torch.device = CPU) -> Preset | None:
    """The preset of that name; None for codec `none`, which takes files as they are.

    Raises:
        UsageError: there is none, or the threshold is negative or not the codec's.
    """
    if codec not in CODECS:
        raise UsageError(f"there is no codec {codec!r}: choose one of {', '.join(CODECS)}")
    if threshold is not None and codec != BITS_BACK:
        raise UsageError(f"a threshold is of codec bits-back: {codec} has nothing to correct")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise UsageError(f"threshold {threshold}: give a number of 0 or more")
    if codec == NONE:
        return None
    if codec == CANONICAL:
        return canonical(device)
    return bits_back(THRESHOLD if threshold is None else threshold, device)


def _planned(
    stored: Mapping[str, TensorSpec], code: str, names: Sequence[str], label: str, params: Mapping[str, Any]
) -> dict[str, TensorSpec]:
    """What is stored once a code has taken some of it; the same where it will decline."""
    makes = {name: stored[name] for name in names}
    try:
        parts = Recipe(code, {}, makes, params).parts()
    except ValueError:
        return dict(stored)
    left = {name: spec for name, spec in stored.items() if name not in makes}
    return left | {f"{label}.{part}": spec for part, spec in parts.items()}


def _as_it_is(architecture: Architecture, layout: Layout) -> Layout:  # noqa: ARG001
    return layout


def _identities(
    architecture: Architecture | None, part: Part, specs: Mapping[str, TensorSpec], *, dense: bool = False
) -> dict[str, Pivots]:
    """The tensors that pairs in canonical form have pivots in."""
    spaces: dict[str, list[tuple[int, int]]] = {}
    dims: dict[str, int] = {}
    for pair in free_pairs(specs, architecture, part, dense=dense):
        span = pair.writes[0]
        dims[span.name] = span.dim
        spaces.setdefault(span.name, []).extend((start, pair.size) for [start] in span.starts)
    return {name: Pivots(sorted(of), dims[name]) for name, of in spaces.items()}


def _triangles(part: Part, specs: Mapping[str, TensorSpec]) -> Iterator[Group]:
    for sub in part.sublayers:
        if sub.site == 1:
            read = sub.first_read(specs)
            yield Group(0, read.name, "lower", (read.weight,), read.weight)
        factor, weight = sub.shortcut.factor, sub.shortcut.weight
        if factor in specs:
            yield Group(sub.site, sub.name, "lower", (factor,), factor)
        elif len(set(specs[weight].shape)) == 1:
            yield Group(sub.site, sub.name, "symmetric", (weight,), weight)
        else:
            yield Group(sub.site, sub.name, "", reason="too few singular values of its shortcut are 1")


def _messages(part: Part, specs: Mapping[str, TensorSpec]) -> Iterator[Group]:
    for sub in part.sublayers:
        if sub.write.weight not in specs:
            continue  # the move has told why
        reads = (read.weight for read in sub.reads if read.weight in specs)
        names = (sub.shortcut.weight, *reads, sub.write.weight)
        params = {"rank": min(specs[sub.write.weight].shape), "corrections": 0, "sums": [0.0] * 4}
        codes = {specs[name].code for name in names}
        if len(codes) == 1 and codes <= {*HALVES}:
            yield Group(sub.site, sub.name, BITS_BACK, names, sub.name, params)
        else:
            yield Group(sub.site, sub.name, "", reason="its words are of different dtypes, or not of 16 bits")


def _projections(architecture: Architecture, layout: Layout) -> Layout:
    """Each free shortcut a factor of the rank that slicing leaves at most, as far as that is less than all."""
    widths, D = layout.widths or (), architecture.hidden_size
    ranks: list[int | None] = []
    for sub in architecture.sublayers:
        before, after = widths[sub.site - 1], widths[sub.site]
        free = sub.site in architecture.free_sites and before <= after
        ranks.append(D - after if free and D - after < before else None)
    return Layout(layout.widths, tuple(ranks))
