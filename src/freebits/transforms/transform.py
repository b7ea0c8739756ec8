"""What a move is: from one model to another, part by part, with an explicit state.

A move decides by which matrix each site of the residual stream is multiplied. It looks at each part alone, which can be
done for several parts at once, and then steps through them in order; what a step hands to the next is its state.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from freebits.execution.work_store import Work
from freebits.models.table import Part
from freebits.storage.folder import Source
from freebits.transforms.orthogonal import rotate
from freebits.types import CPU

Rotations = Mapping[int, Tensor]
"""Site → `Q: (d, d')`, float64; a site without entry stays as it is."""

State = TypeVar("State")
Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Turn:
    """What a move does to one part.

    Attributes:
        rotations: of the sites that the part's tensors touch.
        replaced: gives tensors, not yet rotated, that stand in the place of the source's; None drops one.
        unrounded: names of the tensors that `finish` wants in float64.
        reasons: site that this part leads to → why it was left as it is.
        facts: what the move has measured by now, for the history.
    """

    rotations: Rotations = field(default_factory=dict)
    replaced: Callable[[], Mapping[str, Tensor | None]] = dict
    unrounded: frozenset[str] = frozenset()
    reasons: Mapping[int, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Transform(Protocol[State, Seen]):
    """One move, bound to a source and to what it needs. `begin`, `look` and `step` return what they found."""

    def begin(self) -> State:
        """The state before the first part."""

    def look(self, part: Part) -> Seen:
        """What the move needs to know of a part; called for several parts at once."""

    def step(self, state: State, part: Part, seen: Seen, following: Seen | None) -> tuple[State, Turn]:
        """What to do to a part, knowing what was seen of it and of the one that follows; and the state after it."""

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: "Dtypes") -> None:
        """Change a part's rotated tensors in place; called for several parts at once."""


Dtypes = Callable[[str], torch.dtype]
"""Name of a tensor → dtype to which it is rounded, once, at the end."""


def transform_parts(
    transform: Transform[Any, Any],
    source: Source,
    parts: Sequence[Part],
    dtype: Dtypes,
    work: Work,
    device: torch.device = CPU,
) -> Iterator[tuple[Part, Turn, Callable[[], dict[str, Tensor]]]]:
    """Apply a move to a model: yields each part, its turn, and a function that returns its tensors on any machine.

    The tensors are rotated on `device` and returned on the CPU. The results of `look` are kept as stage `look`.
    """
    looks = chain(work.map("look", transform.look, parts), [None])
    state = transform.begin()
    for part, (seen, following) in zip(parts, pairwise(looks), strict=True):
        state, turn = transform.step(state, part, seen, following)
        yield part, turn, _Turned(transform, source, dtype, part, turn, device)


@dataclass(frozen=True)
class _Turned:
    transform: Transform[Any, Any]
    source: Source
    dtype: Dtypes
    part: Part
    turn: Turn
    device: torch.device

    def __call__(self) -> dict[str, Tensor]:
        """The part's tensors, rotated and rounded."""
        tensors, replaced = {}, self.turn.replaced()
        rotations = {site: Q.to(self.device) for site, Q in self.turn.rotations.items()}
        for name, weight in self.part.weights.items():
            ours = self.source[name] if name in self.source.specs and name not in replaced else None
            tensor = replaced.get(name, ours)
            if tensor is not None:
                dtype = torch.float64 if name in self.turn.unrounded else self.dtype(name)
                tensors[name] = rotate(tensor.to(self.device), weight.axes, rotations, dtype)
        self.transform.finish(self.part, tensors, self.dtype)
        return {name: tensor.cpu() for name, tensor in tensors.items()}


def unsound_sites(source: Source, part: Part) -> dict[int, str]:
    """The sites at which nothing can be rotated, as a tensor of this part is not finite or might overflow; and why."""
    unsound: dict[int, str] = {}
    for name, weight in part.weights.items():
        if name not in source.specs or not weight.axes or not source.specs[name].numel:
            continue
        tensor = source[name]
        most, dims = torch.finfo(tensor.dtype).max, [axis.dim for axis in weight.axes]
        least, largest = torch.aminmax(tensor)
        if max(-least.item(), largest.item()) * math.sqrt(tensor.numel()) < most:
            continue  # no vector in it is longer than that, so none needs to be measured
        if not (torch.linalg.vector_norm(tensor, dim=dims, dtype=torch.float64) < most).all():
            unsound |= {axis.site: f"{name} is not finite or could overflow when rotated" for axis in weight.axes}
    return unsound
