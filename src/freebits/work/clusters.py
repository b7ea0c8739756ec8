"""Workers of Ray, which spreads pieces over machines and does again what was lost with a worker."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import torch

from freebits.errors import FreebitsError, UsageError, one_line
from freebits.work.crew import OnDesk, Results, done_once
from freebits.work.desk import Desk

Item = TypeVar("Item")
Result = TypeVar("Result")
_RETRIES = 8
"""So often a piece is done again whose worker died, or failed for a reason that is not in the piece."""


@contextmanager
def ray_crew(address: str | None, desk: Desk | None) -> Iterator["Cluster"]:
    """A cluster at an address, or one of this machine alone for as long as this lasts.

    Raises:
        UsageError: Ray is not installed, or there is no cluster.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray: Any = import_module("ray")  # an extra
    except ImportError:
        raise UsageError("backend ray is not installed: pip install 'freebits[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # of several kinds
            raise UsageError(f"no Ray cluster at {address or 'this machine'} ({one_line(error, 160)})") from None
    try:
        yield Cluster(ray, desk)
    finally:
        if ours:
            ray.shutdown()


class Cluster(OnDesk):
    """A cluster of Ray; implements `Crew`. This process hands pieces out and takes results in."""

    leads = True

    def __init__(self, ray: Any, desk: Desk | None) -> None:
        super().__init__(desk)
        self._ray = ray
        self._run = ray.remote(max_retries=_RETRIES, retry_exceptions=True)(_run)
        self._run_two = ray.remote(max_retries=_RETRIES, retry_exceptions=True, num_returns=2)(_run_two)
        self._at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def share(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Results[Result]:
        """All results."""
        sent = self._ray.put(function)
        pending: deque[Callable[[], Result]] = deque()
        for numbered in enumerate(items):
            if len(pending) == self._at_once:
                yield pending.popleft()()
            pending.append(self._sent(stage, sent, numbered))
        while pending:
            yield pending.popleft()()

    give = share

    def hold(self, stage: str, chunks: Sequence[Any]) -> list[Any]:  # noqa: ARG002
        """In the cluster's memory."""
        return [self._ray.put(chunk) for chunk in chunks]

    def spread(
        self,
        stage: str,  # noqa: ARG002
        function: Callable[..., tuple[Any, Result]],
        held: list[Any],
        *beside: list[Any],
    ) -> tuple[list[Any], list[Result]]:
        """Each wherever there is a worker; lost chunks are made again from those before."""
        sent = self._ray.put(function)
        pairs = [self._run_two.remote(sent, *chunks) for chunks in zip(held, *beside, strict=True)]
        return [chunk for chunk, _ in pairs], [self._result(result) for _, result in pairs]

    def keep(self, stage: str, held: list[Any]) -> None:
        """On the desk, if there is one."""
        if self.desk is not None:
            for number, chunk in enumerate(held):
                self.desk.put(f"{stage}-kept-{number}", self._ray.get(chunk))

    def kept(self, stage: str, count: int) -> list[Any]:
        """From the desk."""
        if self.desk is None:
            raise LookupError(stage)
        return [self._ray.put(self.desk.get(f"{stage}-kept-{number}")) for number in range(count)]

    def _sent(self, stage: str, function: Any, numbered: tuple[int, Any]) -> Callable[[], Any]:
        number, item = numbered
        if self.desk is not None and self.desk.has(f"{stage}-{number}"):
            return partial(done_once, self.desk, stage, self._again(function), numbered)
        reference = self._run.remote(function, item)
        return partial(done_once, self.desk, stage, lambda _: self._result(reference), numbered)

    def _again(self, function: Any) -> Callable[[Any], Any]:
        """For a piece whose file is damaged."""
        return lambda item: self._result(self._run.remote(function, item))

    def _result(self, reference: Any) -> Any:
        refused, result = self._ray.get(reference)
        if refused is not None:
            raise refused
        return result


def _run(function: Callable[..., Any], *items: Any) -> tuple[FreebitsError | None, Any]:
    """A piece in a worker, which has one processor; what is wrong with the input would be wrong again."""
    torch.set_num_threads(1)
    try:
        return None, function(*items)
    except FreebitsError as error:
        return error, None


def _run_two(function: Callable[..., Any], *chunks: Any) -> tuple[Any, tuple[FreebitsError | None, Any]]:
    """The same for a chunk: what becomes of it, and what was found."""
    refused, results = _run(function, *chunks)
    return (None, (refused, None)) if refused is not None else (results[0], (None, results[1]))
