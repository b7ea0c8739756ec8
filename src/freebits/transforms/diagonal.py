"""Rotate each output matrix to its canonical direction, as bits-back coding requires.

This is Algorithm 1 of arXiv 2410.01309. An output matrix is a matrix that writes to the residual stream.
"""

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
    """The analysis of one part.

    Attributes:
        unsound: site → reason why the site cannot be rotated.
        directions: site → canonical direction of the output matrix that writes to the site.
    """

    unsound: dict[int, str]
    directions: dict[int, Tensor]


@dataclass(frozen=True)
class Diagonal:
    """The transform that rotates each output matrix of a sliced model with dense shortcuts to its canonical direction.

    At each site except site 0, `WᵀW` becomes diagonal for the output matrix `W: (inputs, k)` that writes to the site.
    """

    source: Source
    architecture: Architecture

    def begin(self) -> Rotations:
        """Return the state before site 0, which is not rotated."""
        return {}

    def look(self, part: Part) -> DiagonalAnalysis:
        """Compute the directions of a part, which do not depend on other parts."""
        unsound = unsound_sites(self.source, part)
        unsound |= {
            sub.site: "the sublayer has no single output matrix" for sub in part.sublayers if not self._fits(sub)
        }
        free = [s for s in part.sublayers if s.site in self.architecture.free_sites and s.site not in unsound]
        directions = {sub.site: canonical_direction(self.source[sub.write.weight].T).cpu() for sub in free}
        return DiagonalAnalysis(unsound, directions)

    def step(
        self, state: Rotations, part: Part, analysis: DiagonalAnalysis, following: DiagonalAnalysis | None
    ) -> tuple[Rotations, PartChange]:
        """Return the new state, which is the rotation of the last site of the part, and the change of the part."""
        unsound = analysis.unsound | (following.unsound if following else {})
        if not part.sublayers:
            return {}, PartChange(state, reasons={0: "no output matrix writes to it"} if following else {})
        obstacles = {sub.site: "the tied head fixes its basis" for sub in part.sublayers} | unsound
        rotations = {site: Q for site, Q in analysis.directions.items() if site not in unsound}
        last = part.sublayers[-1].site
        unrounded = frozenset(sub.write.weight for sub in part.sublayers if sub.site in rotations)
        reasons = {sub.site: obstacles[sub.site] for sub in part.sublayers if sub.site not in rotations}
        change = PartChange({**state, **rotations}, unrounded=unrounded, reasons=reasons)
        return {site: Q for site, Q in rotations.items() if site == last}, change

    def _fits(self, sub: Sublayer) -> bool:
        return sub.write.weight in self.source.specs and not sub.write.stacked

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: Dtypes) -> None:
        """Do nothing, because the code `bits-back` rotates the output matrices again and then rounds them."""
