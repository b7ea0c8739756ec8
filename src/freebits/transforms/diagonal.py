"""Rotate each output matrix to its canonical direction, as bits-back coding requires (paper, Algorithm 1)."""

from dataclasses import dataclass

from torch import Tensor

from freebits.codecs.rotation_values import canonical_direction
from freebits.execution.serialization import storable
from freebits.models.architecture import Architecture, Part, Sublayer
from freebits.storage.checkpoint import Source
from freebits.transforms.transform import Dtypes, PartChange, Rotations, unsound_sites


@storable
@dataclass(frozen=True)
class DiagonalAnalysis:
    """The analysis of one part: the sites that cannot be rotated, with reasons, and the directions by site."""

    unsound: dict[int, str]
    directions: dict[int, Tensor]


@dataclass(frozen=True)
class Diagonal:
    """The transform of a sliced model with dense shortcuts that makes `WᵀW` diagonal at each site from 1."""

    source: Source
    architecture: Architecture

    def begin(self) -> Rotations:
        """Return the state before site 0, which is not rotated."""
        return {}

    def look(self, part: Part) -> DiagonalAnalysis:
        """Compute the directions, which are independent of each other."""
        unsound = unsound_sites(self.source, part)
        unsound |= {
            sub.site: "its output matrix varies from block to block" for sub in part.sublayers if not self._fits(sub)
        }
        free = [s for s in part.sublayers if s.site in self.architecture.free_sites and s.site not in unsound]
        directions = {sub.site: canonical_direction(self.source[sub.write.weight].T).cpu() for sub in free}
        return DiagonalAnalysis(unsound, directions)

    def step(
        self, state: Rotations, part: Part, analysis: DiagonalAnalysis, following: DiagonalAnalysis | None
    ) -> tuple[Rotations, PartChange]:
        """Return the rotations of the sites of a part; the new state is the rotation of the last one."""
        unsound = analysis.unsound | (following.unsound if following else {})
        if not part.sublayers:
            return {}, PartChange(state, reasons={0: "no output matrix leads to it"} if following else {})
        obstacles = {sub.site: "the tied head pins it" for sub in part.sublayers} | unsound
        rotations = {site: Q for site, Q in analysis.directions.items() if site not in unsound}
        last = part.sublayers[-1].site
        unrounded = frozenset(sub.write.weight for sub in part.sublayers if sub.site in rotations)
        reasons = {sub.site: obstacles[sub.site] for sub in part.sublayers if sub.site not in rotations}
        turn = PartChange({**state, **rotations}, unrounded=unrounded, reasons=reasons)
        return {site: Q for site, Q in rotations.items() if site == last}, turn

    def _fits(self, sub: Sublayer) -> bool:
        return sub.write.weight in self.source.specs and not sub.write.stacked

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: Dtypes) -> None:
        """Do nothing: the codec rotates the output matrices once more and then rounds them."""
