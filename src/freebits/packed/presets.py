"""The codecs for models. Each has a transform that makes weights redundant, and codes that leave these weights out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from freebits.codecs.base import Code, Declined
from freebits.codecs.bits_back import THRESHOLD, BitsBack
from freebits.codecs.pivots import Pivots
from freebits.codecs.registry import CODES
from freebits.errors import UsageError
from freebits.models.architecture import Architecture, Part
from freebits.models.layout import Layout
from freebits.options import BITS_BACK, CANONICAL, CODECS, NONE
from freebits.packed.encoded_piece import Piece, encoded, plain
from freebits.packed.recipe import Recipe
from freebits.transforms.canonical import Canonical
from freebits.transforms.diagonal import Diagonal
from freebits.transforms.paired import DeviceView, Pairs, free_pairs
from freebits.transforms.transform import PartChange, Transform
from freebits.types import CPU, FLOATS, HALF_DTYPES, TensorSpec

PIVOTS = "pivots"


@dataclass(frozen=True)
class Group:
    """Tensors that one code encodes together.

    Attributes:
        site: site of the residual stream (see `models.architecture`) whose rotation makes the tensors redundant.
        name: name of the sublayer that leads to the site; for site 0, of the layer that reads the stream there.
        code: key of the code in `freebits.codecs.registry.CODES`; empty if no code applies.
        tensors: names of the tensors, in the order that the code expects.
        label: prefix of the stored names.
        params: parameters of the code that are used to plan sizes before encoding.
        reason: reason why no code applies; empty if a code does.
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
    """A codec for sliced models or for dense models.

    Attributes:
        name: name of the codec.
        transform: function that returns the transform, given the model and its architecture. In a sliced model, all
            shortcuts must be dense.
        groups: function that yields the groups of a model part, given the part and the specs of its transformed
            tensors.
        pivots: function that returns name → code for each transformed tensor of a model part that the `pivots` code
            can encode.
        layout: function that returns the layout after the transform, given the architecture and the layout before.
        codes: key → code that replaces the code in `CODES`.
        floats: names of the dtypes that the codec encodes.
        device: device for linear algebra.
        facts: parameters of the codec, recorded in the history.
    """

    name: str
    transform: Callable[[DeviceView, Any], Transform[Any, Any]]
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
        change: PartChange,
        tensors: dict[str, Tensor],
        specs: Mapping[str, TensorSpec],
    ) -> Piece:
        """Encode the transformed tensors of a model part.

        Args:
            architecture: architecture of the model; None for an adapter.
            part: the model part.
            change: effect of the transform on the part.
            tensors: name → transformed tensor.
            specs: name → spec of the transformed tensor, with the dtype to which it is rounded.
        """
        piece = Piece()
        remaining = dict(tensors)
        for group in self.groups(part, specs):
            if group.site not in change.rotations:
                continue  # `change.reasons` has the reason
            note = {"site": group.site, "name": group.name}
            if not group.code:
                piece += Piece(notes=(note | {"reason": group.reason},))
                continue
            code = self.codes.get(group.code) or CODES[group.code]
            makes = {name: specs[name] for name in group.tensors}
            try:
                piece += encoded(group.code, code, group.label, {n: tensors[n] for n in makes}, makes, note)
                remaining = {name: tensor for name, tensor in remaining.items() if name not in makes}
            except Declined as reason:
                piece += Piece(notes=(note | {"reason": str(reason)},))
        for name, code in self.pivots(architecture, part, specs).items():
            if name in remaining:
                with suppress(Declined):
                    piece += encoded(PIVOTS, code, name, {name: remaining[name]}, {name: specs[name]})
                    del remaining[name]
        return piece + plain({name: tensor.to(specs[name].dtype) for name, tensor in remaining.items()})

    def plan(
        self, architecture: Architecture | None, part: Part, specs: Mapping[str, TensorSpec]
    ) -> dict[str, TensorSpec]:
        """Return the specs of the tensors that would be stored for a model part, given the specs of its tensors."""
        stored = {name: specs[name] for name in part.weights if name in specs}
        for group in self.groups(part, specs):
            if architecture is not None and group.site in architecture.free_sites and group.code:
                stored = _planned(stored, group.code, group.tensors, group.label, group.params)
        for name, code in self.pivots(architecture, part, specs).items():
            if name in stored:
                stored = _planned(stored, PIVOTS, (name,), name, code.params)
        return stored


def canonical(device: torch.device = CPU, *, dense: bool = False) -> Preset:
    """Return the preset of the codec `canonical`.

    The codec rotates the stream at sites and changes the bases of pairs of matrices, so that fewer weights need to be
    stored. In a dense model it only changes the bases of pairs.
    """
    if dense:
        return Preset(
            CANONICAL, Pairs, lambda *_: iter(()), partial(_pivot_codes, dense=True), _same_layout, {}, FLOATS, device
        )
    return Preset(CANONICAL, Canonical, _canonical_groups, _pivot_codes, _factored_layout, {}, FLOATS, device)


def bits_back(threshold: float, device: torch.device = CPU) -> Preset:
    """Return the preset of the codec `bits-back`, which corrects decoded values whose error exceeds `threshold`."""
    codes = {BITS_BACK: BitsBack(threshold, device)}
    facts = {"threshold": threshold}
    return Preset(
        BITS_BACK, Diagonal, _bits_back_groups, lambda *_: {}, _same_layout, codes, HALF_DTYPES, device, facts
    )


def chosen(codec: str, threshold: float | None = None, device: torch.device = CPU) -> Preset | None:
    """Return the preset of a codec; None for the codec `none`, which stores files unchanged.

    Raises:
        UsageError: there is no such codec, or `threshold` is negative, not finite, or given for a codec other than
            `bits-back`.
    """
    if codec not in CODECS:
        raise UsageError(f"`codec` is {codec!r}: choose {', '.join(CODECS[:-1])} or {CODECS[-1]}")
    if threshold is not None and codec != BITS_BACK:
        raise UsageError(f"codec {codec} has no threshold: leave out `threshold`, or set `codec` to {BITS_BACK}")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise UsageError(f"`threshold` is {threshold}: give a finite number that is at least 0")
    if codec == NONE:
        return None
    if codec == CANONICAL:
        return canonical(device)
    return bits_back(THRESHOLD if threshold is None else threshold, device)


def _planned(
    stored: Mapping[str, TensorSpec], code: str, names: Sequence[str], label: str, params: Mapping[str, Any]
) -> dict[str, TensorSpec]:
    """Return the stored specs after a code encodes the tensors `names`; unchanged if the code does not accept them."""
    makes = {name: stored[name] for name in names}
    try:
        code_parts = Recipe(code, {}, makes, params).parts()
    except ValueError:
        return dict(stored)
    others = {name: spec for name, spec in stored.items() if name not in makes}
    return others | {f"{label}.{code_part}": spec for code_part, spec in code_parts.items()}


def _same_layout(architecture: Architecture, layout: Layout) -> Layout:  # noqa: ARG001
    return layout


def _pivot_codes(
    architecture: Architecture | None, part: Part, specs: Mapping[str, TensorSpec], *, dense: bool = False
) -> dict[str, Pivots]:
    """Return name → code of each tensor that has pivot columns when pairs of matrices are in canonical form."""
    spaces: dict[str, list[tuple[int, int]]] = {}
    dims: dict[str, int] = {}
    for pair in free_pairs(specs, architecture, part, dense=dense):
        span = pair.writes[0]
        dims[span.name] = span.dim
        spaces.setdefault(span.name, []).extend((start, pair.size) for [start] in span.starts)
    return {name: Pivots(sorted(rows), dims[name]) for name, rows in spaces.items()}


def _canonical_groups(part: Part, specs: Mapping[str, TensorSpec]) -> Iterator[Group]:
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
            yield Group(sub.site, sub.name, "", reason="too few singular values of the shortcut are 1")


def _bits_back_groups(part: Part, specs: Mapping[str, TensorSpec]) -> Iterator[Group]:
    for sub in part.sublayers:
        if sub.write.weight not in specs:
            continue  # the transform reports that the model lacks this matrix
        reads = (read.weight for read in sub.reads if read.weight in specs)
        names = (sub.shortcut.weight, *reads, sub.write.weight)
        params = {"rank": min(specs[sub.write.weight].shape), "corrections": 0, "sums": [0.0] * 4}
        dtype_names = {specs[name].dtype_name for name in names}
        if len(dtype_names) == 1 and dtype_names <= {*HALF_DTYPES}:
            yield Group(sub.site, sub.name, BITS_BACK, names, sub.name, params)
        else:
            yield Group(sub.site, sub.name, "", reason="the tensors do not all have the same 16-bit dtype")


def _factored_layout(architecture: Architecture, layout: Layout) -> Layout:
    """Return the layout in which a shortcut is stored as a factor if this makes it smaller.

    The stream has hidden size `D`, and widths `before` and `after` the shortcut. The planned rank is `D - after`, the
    largest that slicing can leave. It must be less than `before`.
    """
    widths, D = layout.widths or (), architecture.hidden_size
    ranks: list[int | None] = []
    for sub in architecture.sublayers:
        before, after = widths[sub.site - 1], widths[sub.site]
        free = sub.site in architecture.free_sites and before <= after
        ranks.append(D - after if free and D - after < before else None)
    return Layout(layout.widths, tuple(ranks))
