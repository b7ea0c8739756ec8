"""Threads of one process, and processes that see the same folder."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

from freebits.work.crew import OnDesk, Results, done_once
from freebits.work.desk import Desk
from freebits.work.threads import ordered_map

Item = TypeVar("Item")
Result = TypeVar("Result")


class Threads(OnDesk):
    """Threads of this process; implements `Crew`.

    Args:
        executor: the threads.
        desk: where finished pieces lie.
        spills: whether chunks lie there, too, and not in memory.
    """

    leads = True

    def __init__(self, executor: ThreadPoolExecutor, desk: Desk | None = None, *, spills: bool = False) -> None:
        super().__init__(desk)
        self._executor = executor
        self._spilled = desk if spills else None

    def share(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Results[Result]:
        """All results."""
        return ordered_map(self._executor, partial(done_once, self.desk, stage, function), enumerate(items))

    give = share

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

    def _taken(self, chunk: Any) -> Any:
        """A chunk that is held."""
        return chunk if self._spilled is None else self._spilled.get(chunk)

    def _laid(self, stage: str, number: int, chunk: Any) -> Any:
        """A chunk as it is held."""
        if self._spilled is None:
            return chunk
        self._spilled.put(f"{stage}-chunk-{number}", chunk)
        return f"{stage}-chunk-{number}"


class Ranks(OnDesk):
    """One process of many that see the same folder: it does every `world`-th piece. Implements `Crew`.

    Args:
        executor: threads of this process.
        desk: which all of them see.
        rank: number of this process, from 0; that of 0 leads.
        world: how many there are.
    """

    def __init__(self, executor: ThreadPoolExecutor, desk: Desk, rank: int, world: int) -> None:
        super().__init__(desk)
        self._executor = executor
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


def _laid_down(desk: Desk, stage: str, function: Callable[[Any], Any], numbered: tuple[int, Any]) -> None:
    """The same, if only the desk is to have it."""
    if not desk.has(f"{stage}-{numbered[0]}"):
        done_once(desk, stage, function, numbered)
