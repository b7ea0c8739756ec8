"""Transforms map one model to another, part by part, with an explicit state.

A transform decides which matrix multiplies the residual stream at each site (see `freebits.models.architecture`).
`look` analyzes each part independently, so that several parts can be analyzed in parallel. `step` then goes through the
parts in order and passes a state on.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from freebits.execution.work_store import Work
from freebits.models.architecture import Part
from freebits.storage.checkpoint import Source
from freebits.transforms.orthogonal import rotate
from freebits.types import CPU

Rotations = Mapping[int, Tensor]
"""Site → `Q: (d, d')`, float64; a site without an entry is not rotated."""

State = TypeVar("State")
Analysis = TypeVar("Analysis")


@dataclass(frozen=True)
class PartChange:
    """The effect of a transform on one part.

    Attributes:
        rotations: rotations of the sites at which tensors of the part have axes.
        replaced: function that returns name → tensor. Before the rotation, this tensor replaces the source's tensor of
            the same name; None removes that tensor.
        unrounded: names of the tensors that `finish` needs in float64.
        reasons: site → reason why the site is not rotated, for sites to which this part leads.
        facts: measurements so far, for the history of the model.
    """

    rotations: Rotations = field(default_factory=dict)
    replaced: Callable[[], Mapping[str, Tensor | None]] = dict
    unrounded: frozenset[str] = frozenset()
    reasons: Mapping[int, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Transform(Protocol[State, Analysis]):
    """A transform of one source, with its parameters."""

    def begin(self) -> State:
        """Return the state before the first part."""

    def look(self, part: Part) -> Analysis:
        """Analyze a part. This method may be called for several parts in parallel."""

    def step(
        self, state: State, part: Part, analysis: Analysis, following: Analysis | None
    ) -> tuple[State, PartChange]:
        """Return the state after a part and the change of the part, from the analyses of this and the next part."""

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: "Dtypes") -> None:
        """Change the rotated tensors of a part in place. This method may be called for several parts in parallel."""


Dtypes = Callable[[str], torch.dtype]
"""Name of a tensor → dtype to which the tensor is rounded, once, at the end."""


def transform_parts(
    transform: Transform[Any, Any],
    source: Source,
    parts: Sequence[Part],
    dtype: Dtypes,
    work: Work,
    device: torch.device = CPU,
) -> Iterator[tuple[Part, PartChange, Callable[[], dict[str, Tensor]]]]:
    """Apply a transform to a model, and yield each part, its change, and a function that computes its tensors.

    The function can run on another machine. It rotates on `device` and returns name → tensor on the CPU. `work` stores
    the results of the method `look` as stage `look`.
    """
    analyses = chain(work.map("look", transform.look, parts), [None])
    state = transform.begin()
    for part, (analysis, following) in zip(parts, pairwise(analyses), strict=True):
        state, change = transform.step(state, part, analysis, following)
        yield part, change, _TransformedPart(transform, source, dtype, part, change, device)


@dataclass(frozen=True)
class _TransformedPart:
    transform: Transform[Any, Any]
    source: Source
    dtype: Dtypes
    part: Part
    change: PartChange
    device: torch.device

    def __call__(self) -> dict[str, Tensor]:
        """Return the tensors of the part, rotated and rounded."""
        tensors, replaced = {}, self.change.replaced()
        rotations = {site: Q.to(self.device) for site, Q in self.change.rotations.items()}
        for name, weight in self.part.weights.items():
            unchanged = self.source[name] if name in self.source.specs and name not in replaced else None
            tensor = replaced.get(name, unchanged)
            if tensor is not None:
                dtype = torch.float64 if name in self.change.unrounded else self.dtype(name)
                tensors[name] = rotate(tensor.to(self.device), weight.axes, rotations, dtype)
        self.transform.finish(self.part, tensors, self.dtype)
        return {name: tensor.cpu() for name, tensor in tensors.items()}


def unsound_sites(source: Source, part: Part) -> dict[int, str]:
    """Return site → reason, for sites at which a tensor of this part is not finite or could overflow when rotated."""
    unsound: dict[int, str] = {}
    for name, weight in part.weights.items():
        if name not in source.specs or not weight.axes or not source.specs[name].numel:
            continue
        tensor = source[name]
        limit, dims = torch.finfo(tensor.dtype).max, [axis.dim for axis in weight.axes]
        smallest, largest = torch.aminmax(tensor)
        if max(-smallest.item(), largest.item()) * math.sqrt(tensor.numel()) < limit:
            continue  # the product bounds the norm of every vector in the tensor, so no rotation can overflow
        if not (torch.linalg.vector_norm(tensor, dim=dims, dtype=torch.float64) < limit).all():
            unsound |= {axis.site: f"{name} is not finite or could overflow when rotated" for axis in weight.axes}
    return unsound
