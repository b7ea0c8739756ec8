"""Workers of Ray, which spreads pieces over machines and does again what was lost with a worker."""

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from freebits.errors import FreebitsError, UsageError, one_line

Item = TypeVar("Item")
Result = TypeVar("Result")
_RETRIES = 8
"""How often a piece is done again whose worker died, or failed for a reason that is not in the piece."""
_TIMEOUT = 10
"""Seconds in which a cluster must accept a connection. Ray itself would try for many minutes."""


@contextmanager
def ray_workers(address: str | None) -> Iterator["RayWorkers"]:
    """The cluster at an address; by default the one that runs on this machine, else a new one until the block ends.

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
            _check_reachable(address)
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # of several kinds
            raise UsageError(f"no Ray cluster at {address or 'this machine'} ({one_line(error, 160)})") from None
    try:
        yield RayWorkers(ray)
    finally:
        if ours:
            ray.shutdown()


class RayWorkers:
    """A cluster of Ray; implements `Executor`. This process hands pieces out and takes results in."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._run = ray.remote(max_retries=_RETRIES, retry_exceptions=True)(_run)
        self._at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Twice as many pieces at once as the cluster has processors."""
        sent = self._ray.put(function)
        pending: deque[Any] = deque()
        for item in items:
            if len(pending) == self._at_once:
                yield self._result(pending.popleft())
            pending.append(self._run.remote(sent, item, Path.cwd()))
        while pending:
            yield self._result(pending.popleft())

    def map_large(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The same: each worker has one item at a time."""
        return self.map(function, items)

    def _result(self, reference: Any) -> Any:
        refused, result = self._ray.get(reference)
        if refused is not None:
            raise refused
        return result


def _check_reachable(address: str | None) -> None:
    """Raise an `OSError` if nothing accepts connections at HOST:PORT."""
    host, _, port = (address or "").rpartition(":")
    if port.isdigit() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT).close()


def _run(function: Callable[..., Any], item: Any, folder: Path) -> tuple[FreebitsError | None, Any]:
    """Run a piece in a worker, which has one processor.

    Relative paths start from `folder`, where that exists. An error in the input would occur again, so it is returned.
    """
    with suppress(OSError):
        os.chdir(folder)
    torch.set_num_threads(1)
    try:
        return None, function(item)
    except FreebitsError as error:
        return error, None
