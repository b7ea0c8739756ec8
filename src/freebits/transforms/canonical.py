"""The canonical form of a sliced model: each site is rotated so that the shortcuts need few weights.

`freebits.transforms.polar` describes the chain of rotations. The chain leaves the rotation of site 0 free. This
rotation is chosen so that the first matrix that reads the stream becomes lower trapezoidal.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from freebits.execution.serialization import storable
from freebits.models.architecture import Architecture, Part, Sublayer
from freebits.models.free_bases import Pair
from freebits.transforms.paired import DeviceView, canonicalize_pairs, free_pairs
from freebits.transforms.polar import PolarForm, carried_rotation, polar_form, trapezoid, triangular_rotation
from freebits.transforms.transform import Dtypes, PartChange, unsound_sites

storable(PolarForm)

MIN_TOLERANCE = 1e-10
"""Smallest tolerance for any dtype. A singular value counts as 1 if it differs from 1 by at most the tolerance."""


@storable
@dataclass(frozen=True)
class CanonicalAnalysis:
    """The analysis of one part.

    Attributes:
        unsound: site → reason why the site cannot be rotated; see `unsound_sites`.
        forms: site → polar form of the shortcut that leads to the site.
        first: rotation of site 0; None for all parts but the first block, and for the first block if site 0 is unsound.
    """

    unsound: dict[int, str]
    forms: dict[int, PolarForm]
    first: Tensor | None


@dataclass(frozen=True)
class Chain:
    """The rotation of the latest site in the chain. `rotated` is False if this site stays unrotated."""

    rotation: Tensor
    rotated: bool


@dataclass(frozen=True)
class Canonical:
    """The transform that brings a sliced model with dense shortcuts into canonical form."""

    source: DeviceView
    architecture: Architecture

    def begin(self) -> Chain:
        """Return the state before site 0."""
        return Chain(torch.empty(0, 0), rotated=False)

    def look(self, part: Part) -> CanonicalAnalysis:
        """Compute the decompositions of a part, which do not depend on other parts."""
        unsound = unsound_sites(self.source, part)
        free = [sub for sub in part.sublayers if not self._obstacle(sub) and sub.site not in unsound]
        forms = {sub.site: self._form(sub) for sub in free}
        readers = [
            sub.first_read(self.source.specs).weight for sub in part.sublayers if sub.site == 1 and 0 not in unsound
        ]
        first = triangular_rotation(self.source[readers[0]].double()).cpu() if readers else None
        return CanonicalAnalysis(unsound, forms, first)

    def step(
        self, state: Chain, part: Part, analysis: CanonicalAnalysis, following: CanonicalAnalysis | None
    ) -> tuple[Chain, PartChange]:
        """Compute the rotations of a part from the rotation of the previous site, by matrix products only."""
        unsound = analysis.unsound | (following.unsound if following else {})
        rotations: dict[int, Tensor] = {}
        replaced: dict[str, Tensor | None] = {}
        reasons: dict[int, str] = {}
        if not part.sublayers and following:  # the embeddings
            state, reasons = self._start(unsound, following)
            return state, PartChange({0: state.rotation} if state.rotated else {}, reasons=reasons)
        sites = [sub.site for sub in part.sublayers]
        if state.rotated:
            rotations[sites[0] - 1 if sites else self.architecture.n_sites - 1] = state.rotation
        for sub in part.sublayers:
            if reason := self._obstacle(sub) or unsound.get(sub.site, ""):
                reasons[sub.site] = reason
                state = Chain(torch.eye(self._widths(sub)[1], dtype=torch.float64), rotated=False)  # a new chain begins
                continue
            form = analysis.forms[sub.site]
            before, after = (G.to(self.source.device) for G in (state.rotation, form.rotation))
            state = Chain(carried_rotation(before, after).cpu(), rotated=True)
            rotations[sub.site] = state.rotation
            if form.factor is not None:
                replaced |= {sub.shortcut.weight: None, sub.shortcut.factor: form.factor}
        factors = {name for name, tensor in replaced.items() if tensor is not None}
        in_pairs = {name for pair in self._pairs(part) for name in pair.names}
        return state, PartChange(rotations, partial(dict, replaced), frozenset(factors | in_pairs), reasons)

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: Dtypes) -> None:
        """Put pairs of matrices in canonical form, and make shortcut factors trapezoidal by rotating their columns."""
        canonicalize_pairs(self._pairs(part), tensors, dtype)
        for sub in part.sublayers:
            if sub.shortcut.factor in tensors:
                factor = trapezoid(tensors[sub.shortcut.factor])
                tensors[sub.shortcut.factor] = factor.to(dtype(sub.shortcut.weight))

    def _start(self, unsound: dict[int, str], following: CanonicalAnalysis) -> tuple[Chain, dict[int, str]]:
        if 0 not in unsound and following.first is not None:
            return Chain(following.first, rotated=True), {}
        width = self._widths(self.architecture.sublayers[0])[0]
        return Chain(torch.eye(width, dtype=torch.float64), rotated=False), {0: unsound[0]}

    def _form(self, sub: Sublayer) -> PolarForm:
        A, (_, after) = self.source[sub.shortcut.weight], self._widths(sub)
        tolerance = max(torch.finfo(A.dtype).eps, MIN_TOLERANCE)
        form = polar_form(A.double().T, tolerance, self.architecture.hidden_size - after)
        return PolarForm(form.rotation.cpu(), None if form.factor is None else form.factor.cpu())

    def _pairs(self, part: Part) -> list[Pair]:
        return free_pairs(self.source.specs, self.architecture, part, dense=False)

    def _widths(self, sub: Sublayer) -> tuple[int, int]:
        """Return the widths of the sites before and after a sublayer."""
        after, before = self.source.specs[sub.shortcut.weight].shape
        return before, after

    def _obstacle(self, sub: Sublayer) -> str:
        """Return the reason why the site after a sublayer cannot be rotated, whatever its weights; empty if none."""
        before, after = self._widths(sub)
        if sub.site not in self.architecture.free_sites:
            return "the tied head fixes its basis"
        return "the stream narrows here" if after < before else ""
