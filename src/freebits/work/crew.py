"""Who does the work: threads of this process, ranks of a cluster, workers of Ray. Ours is the list of pieces."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from freebits.errors import UsageError
from freebits.options import BACKENDS, RAY, THREADS
from freebits.work.desk import Desk
from freebits.work.threads import ordered_map, workers

Item = TypeVar("Item")
Result = TypeVar("Result")
Results = Generator[Result, None, None]
"""In the order of the pieces, each as soon as it and those before it are there."""


class Crew(Protocol):
    """Does pieces of work, several at once, and hands the results on in order.

    A piece is known by a stage and its number; what it does depends on nothing but its item, so that whoever finds it
    finished on the desk need not do it.

    Attributes:
        leads: whether this process writes what comes of it.
        desk: where finished pieces lie, if anywhere.
    """

    leads: bool
    desk: Desk | None

    def share(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Results[Result]:
        """The results, for everyone."""

    def give(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Results[Result]:
        """The results, for whoever leads; nothing for others."""

    def agree(self, stage: str, function: Callable[[Item], Result], item: Item) -> Result:
        """One result, found by whoever leads, for everyone; of which it lies on the desk from then on."""

    def hold(self, stage: str, chunks: Sequence[Any]) -> list[Any]:
        """Chunks of what is too large to be passed around, each to stay with whoever works on it."""

    def spread(
        self, stage: str, function: Callable[..., tuple[Any, Result]], held: list[Any], *beside: list[Any]
    ) -> tuple[list[Any], list[Result]]:
        """What becomes of chunks that are held, and what was found on the way, for everyone."""

    def keep(self, stage: str, held: list[Any]) -> None:
        """Lay chunks down, to go on with after a stop."""

    def kept(self, stage: str, count: int) -> list[Any]:
        """The chunks that were laid down."""

    def has(self, stage: str) -> bool:
        """Whether the one result of a stage lies on the desk."""

    def has_kept(self, stage: str, count: int) -> bool:
        """Whether the chunks were laid down."""

    def forget(self, stage: str) -> None:
        """Results of a stage are needed no more."""


class Threads:
    """Threads of this process; implements `Crew`.

    Args:
        executor: the threads.
        desk: where finished pieces lie.
        spills: whether chunks lie there, too, and not in memory.
    """

    leads = True

    def __init__(self, executor: ThreadPoolExecutor, desk: Desk | None = None, *, spills: bool = False) -> None:
        self._executor = executor
        self.desk = desk
        self._spilled = desk if spills else None

    def share(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Results[Result]:
        """All results."""
        return ordered_map(self._executor, partial(done_once, self.desk, stage, function), enumerate(items))

    give = share

    def agree(self, stage: str, function: Callable[[Item], Result], item: Item) -> Result:
        """Found here, unless it lies on the desk."""
        return cast("Result", done_once(self.desk, stage, function, (0, item)))

    def hold(self, stage: str, chunks: Sequence[Any]) -> list[Any]:
        """In memory, or on the desk."""
        return [self._laid(stage, *numbered) for numbered in enumerate(chunks)]

    def spread(
        self, stage: str, function: Callable[..., tuple[Any, Result]], held: list[Any], *beside: list[Any]
    ) -> tuple[list[Any], list[Result]]:
        """One after another, each with all threads of PyTorch."""
        results = []
        after = list(held)
        held.clear()
        for number in range(len(after)):
            chunk, result = function(*(self._taken(of[number]) for of in (after, *beside)))
            results.append(result)
            before, after[number] = after[number], self._laid(stage, number, chunk)
            if self._spilled is not None and before != after[number]:
                self._spilled.drop(before)
        return after, results

    def keep(self, stage: str, held: list[Any]) -> None:
        """On the desk, if there is one."""
        if self.desk is not None:
            for number, chunk in enumerate(held):
                self.desk.put(f"{stage}-kept-{number}", self._taken(chunk))

    def kept(self, stage: str, count: int) -> list[Any]:
        """From the desk."""
        if self.desk is None:
            raise LookupError(stage)
        desk = self.desk
        return [self._laid(stage, number, desk.get(f"{stage}-kept-{number}")) for number in range(count)]

    def forget(self, stage: str) -> None:
        """What lies on the desk."""
        if self.desk is not None:
            self.desk.drop(f"{stage}-*")

    def has(self, stage: str) -> bool:
        """On the desk."""
        return self.desk is not None and self.desk.has(f"{stage}-0")

    def has_kept(self, stage: str, count: int) -> bool:
        """On the desk."""
        desk = self.desk
        return desk is not None and all(desk.has(f"{stage}-kept-{number}") for number in range(count))

    def _taken(self, chunk: Any) -> Any:
        """A chunk that is held."""
        return chunk if self._spilled is None else self._spilled.get(chunk)

    def _laid(self, stage: str, number: int, chunk: Any) -> Any:
        """A chunk as it is held."""
        if self._spilled is None:
            return chunk
        self._spilled.put(f"{stage}-chunk-{number}", chunk)
        return f"{stage}-chunk-{number}"


class Ranks:
    """One process of many that see the same folder: it does every `world`-th piece. Implements `Crew`.

    Args:
        executor: threads of this process.
        desk: which all of them see.
        rank: number of this process, from 0; that of 0 leads.
        world: how many there are.
    """

    def __init__(self, executor: ThreadPoolExecutor, desk: Desk, rank: int, world: int) -> None:
        self._executor = executor
        self.desk: Desk | None = desk
        self._shared = desk
        self._rank, self._world = rank, world
        self.leads = rank == 0

    def share(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Results[Result]:
        """Ours first, so that the others need not wait for them; then everybody's."""
        numbered = [*enumerate(items)]
        for _ in self._ours(stage, function, numbered):
            pass
        return (self._shared.wait(f"{stage}-{number}") for number, _ in numbered)

    def give(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Results[Result]:
        """Ours, and everybody's if we lead."""
        count = 0

        def counted() -> Iterator[tuple[int, Item]]:
            nonlocal count
            for count, item in enumerate(items, start=1):
                yield count - 1, item

        for _ in self._ours(stage, function, counted()):
            pass
        if self.leads:
            yield from (self._shared.wait(f"{stage}-{number}") for number in range(count))

    def agree(self, stage: str, function: Callable[[Item], Result], item: Item) -> Result:
        """Found by whoever leads."""
        if self.leads:
            return cast("Result", done_once(self._shared, stage, function, (0, item)))
        return cast("Result", self._shared.wait(f"{stage}-0"))

    def hold(self, stage: str, chunks: Sequence[Any]) -> list[Any]:  # noqa: ARG002
        """Ours in memory; of others' nothing."""
        return [chunk if self._is_ours(number) else None for number, chunk in enumerate(chunks)]

    def spread(
        self, stage: str, function: Callable[..., tuple[Any, Result]], held: list[Any], *beside: list[Any]
    ) -> tuple[list[Any], list[Result]]:
        """Ours; results by way of the desk."""
        after = list(held)
        held.clear()
        for number in range(len(after)):
            if self._is_ours(number):
                after[number], result = function(*(of[number] for of in (after, *beside)))
                if not self._shared.has(f"{stage}-{number}"):
                    self._shared.put(f"{stage}-{number}", result)
        return after, [self._shared.wait(f"{stage}-{number}") for number in range(len(after))]

    def keep(self, stage: str, held: list[Any]) -> None:
        """Ours, on the desk."""
        for number, chunk in enumerate(held):
            if self._is_ours(number):
                self._shared.put(f"{stage}-kept-{number}", chunk)

    def kept(self, stage: str, count: int) -> list[Any]:
        """Ours, from the desk."""
        keys = [f"{stage}-kept-{number}" if self._is_ours(number) else None for number in range(count)]
        return [self._shared.get(key) if key else None for key in keys]

    def forget(self, stage: str) -> None:
        """By whoever leads, who knows that all are past it."""
        if self.leads:
            self._shared.drop(f"{stage}-*")

    def has(self, stage: str) -> bool:
        """On the desk."""
        return self._shared.has(f"{stage}-0")

    def has_kept(self, stage: str, count: int) -> bool:
        """Ours, on the desk."""
        return all(self._shared.has(f"{stage}-kept-{number}") for number in range(count) if self._is_ours(number))

    def _is_ours(self, number: int) -> bool:
        return number % self._world == self._rank

    def _ours(
        self, stage: str, function: Callable[[Item], Result], numbered: Iterable[tuple[int, Item]]
    ) -> Results[None]:
        ours = ((number, item) for number, item in numbered if self._is_ours(number))
        return ordered_map(self._executor, partial(_laid_down, self._shared, stage, function), ours)


@dataclass(frozen=True)
class Team:
    """How users say who does the work.

    Attributes:
        jobs: pieces at once in a process; by default one a thread of PyTorch's, at most four.
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
    def crew(self, desk: Desk | None) -> Iterator[Crew]:
        """Those who do the work, for as long as this lasts."""
        if self.backend == RAY:
            from freebits.work.clusters import ray_crew  # ray is an extra

            with ray_crew(self.address, desk) as crew:
                yield crew
        else:
            with workers(self.jobs) as executor:
                yield self._here(executor, desk)

    def _here(self, executor: ThreadPoolExecutor, desk: Desk | None) -> Crew:
        if desk is not None and self.shared:
            return Ranks(executor, desk, self.rank, self.world)
        return Threads(executor, desk, spills=self.spills)


def done_once(desk: Desk | None, stage: str, function: Callable[[Any], Any], numbered: tuple[int, Any]) -> Any:
    """The result of a piece, which is laid on the desk, or lies there."""
    number, item = numbered
    key = f"{stage}-{number}"
    if desk is not None and desk.has(key):
        try:
            return desk.get(key)
        except ValueError:  # damaged: it is done again
            pass
    result = function(item)
    if desk is not None:
        desk.put(key, result)
    return result


def _laid_down(desk: Desk, stage: str, function: Callable[[Any], Any], numbered: tuple[int, Any]) -> None:
    """The same, if only the desk is to have it."""
    if not desk.has(f"{stage}-{numbered[0]}"):
        done_once(desk, stage, function, numbered)
