"""Who does the work, as users say it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from freebits.errors import UsageError
from freebits.options import BACKENDS, RAY, THREADS
from freebits.work.clusters import ray_crew
from freebits.work.crew import Crew
from freebits.work.desk import Desk
from freebits.work.processes import Ranks, Threads
from freebits.work.threads import workers


@dataclass(frozen=True)
class Team:
    """How users say who does the work.

    Attributes:
        jobs: pieces at once in a process; by default one a thread of PyTorch's, at most four, of large blocks fewer.
        backend: `threads` of this process, or `ray`.
        address: of a Ray cluster; by default a local one.
        rank: number of this process among `world` that are given the same command and see the same folders.
        world: how many there are.
        spills: whether what is calibrated on lies on disk between two blocks, not in memory.

    Raises:
        UsageError: that makes no sense.
    """

    jobs: int | None = None
    backend: str = THREADS
    address: str | None = None
    rank: int = 0
    world: int = 1
    spills: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"there is no backend {self.backend!r}: choose one of {', '.join(BACKENDS)}")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs {self.jobs}: give at least one")
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank {self.rank} of {self.world}: give 0 to {self.world - 1}, and a world of 1 at least")
        if self.world > 1 and self.backend != THREADS:
            raise UsageError("--rank and --world are for processes without Ray: give one or the other")

    @property
    def shared(self) -> bool:
        """Whether other processes work on the same draft."""
        return self.world > 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what comes of it."""
        return self.rank == 0

    @contextmanager
    def crew(self, desk: Desk | None, piece: int = 0) -> Iterator[Crew]:
        """Those who do the work, for as long as this lasts; see `workers` for the bytes of a piece."""
        if self.backend == RAY:
            with ray_crew(self.address, desk) as crew:
                yield crew
        else:
            with workers(self.jobs, piece) as executor:
                yield self._here(executor, desk)

    def _here(self, executor: ThreadPoolExecutor, desk: Desk | None) -> Crew:
        if desk is not None and self.shared:
            return Ranks(executor, desk, self.rank, self.world)
        return Threads(executor, desk, spills=self.spills)
