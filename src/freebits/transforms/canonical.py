"""The canonical form: rotations chosen so that shortcuts need few numbers, and nothing is left to decode.

See `freebits.transforms.polar` for the chain of rotations. The last one free, of site 0, makes the first matrix that
reads the stream lower trapezoidal.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from freebits.execution.stored_values import kept
from freebits.models.pairs import Pair
from freebits.models.table import Architecture, Part, Sublayer
from freebits.transforms.paired import Placed, free_pairs, turn_pairs
from freebits.transforms.polar import PolarForm, carried_rotation, polar_form, trapezoid, triangular_rotation
from freebits.transforms.transform import Dtypes, Turn, unsound_sites

kept(PolarForm)

FINEST = 1e-10
"""No spectrum is told from that of a corner more finely than this, whatever the dtype."""


@kept
@dataclass(frozen=True)
class Seen:
    """What is seen of a part.

    Attributes:
        unsound: sites at which nothing can be rotated, with the reason.
        forms: site → polar form of the shortcut that leads there.
        first: of the first block, the rotation for site 0; else None.
    """

    unsound: dict[int, str]
    forms: dict[int, PolarForm]
    first: Tensor | None


@dataclass(frozen=True)
class Chain:
    """The rotation of the last site reached; `turned` is false where that site had to stay."""

    rotation: Tensor
    turned: bool


@dataclass(frozen=True)
class Canonical:
    """The move, of a sliced model with dense shortcuts."""

    source: Placed
    architecture: Architecture

    def begin(self) -> Chain:
        """Before site 0."""
        return Chain(torch.empty(0, 0), turned=False)

    def look(self, part: Part) -> Seen:
        """The decompositions, which do not depend on each other."""
        unsound = unsound_sites(self.source, part)
        free = [sub for sub in part.sublayers if not self._obstacle(sub) and sub.site not in unsound]
        forms = {sub.site: self._form(sub) for sub in free}
        readers = [
            sub.first_read(self.source.specs).weight for sub in part.sublayers if sub.site == 1 and 0 not in unsound
        ]
        first = triangular_rotation(self.source[readers[0]].double()).cpu() if readers else None
        return Seen(unsound, forms, first)

    def step(self, state: Chain, part: Part, seen: Seen, following: Seen | None) -> tuple[Chain, Turn]:
        """The next rotations of the chain, which are products."""
        unsound = seen.unsound | (following.unsound if following else {})
        rotations: dict[int, Tensor] = {}
        replaced: dict[str, Tensor | None] = {}
        reasons: dict[int, str] = {}
        if not part.sublayers and following:  # the embeddings
            state, reasons = self._start(unsound, following)
            return state, Turn({0: state.rotation} if state.turned else {}, reasons=reasons)
        sites = [sub.site for sub in part.sublayers]
        if state.turned:
            rotations[sites[0] - 1 if sites else self.architecture.n_sites - 1] = state.rotation
        for sub in part.sublayers:
            if reason := self._obstacle(sub) or unsound.get(sub.site, ""):
                reasons[sub.site] = reason
                state = Chain(torch.eye(self._widths(sub)[1], dtype=torch.float64), turned=False)  # a new chain begins
                continue
            form = seen.forms[sub.site]
            before, after = (G.to(self.source.device) for G in (state.rotation, form.rotation))
            state = Chain(carried_rotation(before, after).cpu(), turned=True)
            rotations[sub.site] = state.rotation
            if form.factor is not None:
                replaced |= {sub.shortcut.weight: None, sub.shortcut.factor: form.factor}
        factors = {name for name, tensor in replaced.items() if tensor is not None}
        pairs = {name for pair in self._pairs(part) for name in pair.names}
        return state, Turn(rotations, partial(dict, replaced), frozenset(factors | pairs), reasons)

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: Dtypes) -> None:
        """A factor's columns are free up to a rotation, which makes it lower trapezoidal; pairs have a form, too."""
        turn_pairs(self._pairs(part), tensors, dtype)
        for sub in part.sublayers:
            if sub.shortcut.factor in tensors:
                factor = trapezoid(tensors[sub.shortcut.factor])
                tensors[sub.shortcut.factor] = factor.to(dtype(sub.shortcut.weight))

    def _start(self, unsound: dict[int, str], following: Seen) -> tuple[Chain, dict[int, str]]:
        if 0 not in unsound and following.first is not None:
            return Chain(following.first, turned=True), {}
        width = self._widths(self.architecture.sublayers[0])[0]
        return Chain(torch.eye(width, dtype=torch.float64), turned=False), {0: unsound[0]}

    def _form(self, sub: Sublayer) -> PolarForm:
        A, (_, after) = self.source[sub.shortcut.weight], self._widths(sub)
        tolerance = max(torch.finfo(A.dtype).eps, FINEST)
        form = polar_form(A.double().T, tolerance, self.architecture.hidden_size - after)
        return PolarForm(form.rotation.cpu(), None if form.factor is None else form.factor.cpu())

    def _pairs(self, part: Part) -> list[Pair]:
        return free_pairs(self.source.specs, self.architecture, part, dense=False)

    def _widths(self, sub: Sublayer) -> tuple[int, int]:
        """Of the sites before and after a sublayer."""
        after, before = self.source.specs[sub.shortcut.weight].shape
        return before, after

    def _obstacle(self, sub: Sublayer) -> str:
        """Why a site's rotation cannot be chosen, whatever its numbers are; empty if it can."""
        before, after = self._widths(sub)
        if sub.site not in self.architecture.free_sites:
            return "the tied head pins it"
        return "the stream narrows here" if after < before else ""
