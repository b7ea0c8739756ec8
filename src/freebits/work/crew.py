"""Who does the work: threads of this process, ranks of a cluster, workers of Ray. Ours is the list of pieces."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

from freebits.work.desk import Desk

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


class OnDesk:
    """What crews have in common whose pieces lie on a desk, or nowhere."""

    def __init__(self, desk: Desk | None) -> None:
        self.desk = desk

    def agree(self, stage: str, function: Callable[[Item], Result], item: Item) -> Result:
        """Found here, unless it lies on the desk."""
        return cast("Result", done_once(self.desk, stage, function, (0, item)))

    def has(self, stage: str) -> bool:
        """On the desk."""
        return self.desk is not None and self.desk.has(f"{stage}-0")

    def has_kept(self, stage: str, count: int) -> bool:
        """On the desk."""
        desk = self.desk
        return desk is not None and all(desk.has(f"{stage}-kept-{number}") for number in range(count))

    def forget(self, stage: str) -> None:
        """What lies on the desk."""
        if self.desk is not None:
            self.desk.drop(f"{stage}-*")


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
