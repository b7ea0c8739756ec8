"""What bits-back coding needs first: each output matrix turned to its canonical direction (paper, Algorithm 1)."""

from dataclasses import dataclass

from torch import Tensor

from freebits.codecs.rotation_values import canonical_direction
from freebits.execution.stored_values import kept
from freebits.models.table import Architecture, Part, Sublayer
from freebits.storage.folder import Source
from freebits.transforms.transform import Dtypes, Rotations, Turn, unsound_sites


@kept
@dataclass(frozen=True)
class Seen:
    """What is seen of a part: unsound sites with the reason, and the directions of its output matrices by site."""

    unsound: dict[int, str]
    directions: dict[int, Tensor]


@dataclass(frozen=True)
class Diagonal:
    """The move, of a sliced model with dense shortcuts: `WᵀW` becomes diagonal at each site but the first."""

    source: Source
    architecture: Architecture

    def begin(self) -> Rotations:
        """Site 0 stays."""
        return {}

    def look(self, part: Part) -> Seen:
        """The directions, which do not depend on each other."""
        unsound = unsound_sites(self.source, part)
        unsound |= {
            sub.site: "its output matrix varies from block to block" for sub in part.sublayers if not self._fits(sub)
        }
        free = [s for s in part.sublayers if s.site in self.architecture.free_sites and s.site not in unsound]
        directions = {sub.site: canonical_direction(self.source[sub.write.weight].T).cpu() for sub in free}
        return Seen(unsound, directions)

    def step(self, state: Rotations, part: Part, seen: Seen, following: Seen | None) -> tuple[Rotations, Turn]:
        """The rotations of a part's sites; the state is that of its last."""
        unsound = seen.unsound | (following.unsound if following else {})
        if not part.sublayers:
            return {}, Turn(state, reasons={0: "no output matrix leads to it"} if following else {})
        reasons = {sub.site: "the tied head pins it" for sub in part.sublayers} | unsound
        after = {site: Q for site, Q in seen.directions.items() if site not in unsound}
        last = part.sublayers[-1].site
        unrounded = frozenset(sub.write.weight for sub in part.sublayers if sub.site in after)
        plain = {sub.site: reasons[sub.site] for sub in part.sublayers if sub.site not in after}
        return {s: Q for s, Q in after.items() if s == last}, Turn(
            {**state, **after}, unrounded=unrounded, reasons=plain
        )

    def _fits(self, sub: Sublayer) -> bool:
        return sub.write.weight in self.source.specs and not sub.write.stacked

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: Dtypes) -> None:
        """Nothing: the code rotates the output matrices once more before they are rounded."""
