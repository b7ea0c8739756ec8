"""Run pieces of work on a Ray cluster. Ray distributes pieces over machines, and reruns a piece if its worker dies."""

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
"""How often a piece is rerun if its worker dies or the piece raises an error other than `FreebitsError`."""
_TIMEOUT = 10
"""Seconds to wait for a cluster to accept a connection. Ray itself would try for many minutes."""


@contextmanager
def ray_workers(address: str | None) -> Iterator["RayWorkers"]:
    """Connect to a Ray cluster until the `with` block ends.

    Args:
        address: HOST:PORT. If None, use a cluster that runs on this machine; if there is none, start a new one.

    Raises:
        UsageError: Ray is not installed, or no cluster can be reached or started.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray: Any = import_module("ray")  # an optional dependency
    except ImportError:
        raise UsageError("`backend` ray needs the package ray: run pip install 'freebits[ray]'") from None
    must_connect = not ray.is_initialized()
    if must_connect:
        try:
            _check_reachable(address)
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray raises many types
            place = f"at {address}" if address else "on this machine"
            raise UsageError(
                f"no Ray cluster {place} can be reached ({one_line(error, 160)}): start one or change `address`"
            ) from None
    try:
        yield RayWorkers(ray)
    finally:
        if must_connect:
            ray.shutdown()


class RayWorkers:
    """A Ray cluster that this process sends pieces to; implements `Executor`."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._remote_run = ray.remote(max_retries=_RETRIES, retry_exceptions=True)(_run)
        self._max_pending = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See `Executor`. At most two pieces per processor of the cluster are pending at once."""
        function_reference = self._ray.put(function)
        pending: deque[Any] = deque()
        for item in items:
            if len(pending) == self._max_pending:
                yield self._result(pending.popleft())
            pending.append(self._remote_run.remote(function_reference, item, Path.cwd()))
        while pending:
            yield self._result(pending.popleft())

    def map_large(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Do the same as `map`, because each worker runs only one item at a time."""
        return self.map(function, items)

    def _result(self, reference: Any) -> Any:
        error, result = self._ray.get(reference)
        if error is not None:
            raise error
        return result


def _check_reachable(address: str | None) -> None:
    """Raise `OSError` if the address is HOST:PORT and nothing accepts connections there."""
    host, _, port = (address or "").rpartition(":")
    if port.isdigit() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT).close()


def _run(function: Callable[..., Any], item: Any, folder: Path) -> tuple[FreebitsError | None, Any]:
    """Run a piece in a worker with one processor. Relative paths start from `folder` if `folder` exists.

    A `FreebitsError` is returned instead of raised, because Ray would rerun the piece and the error would occur again.
    """
    with suppress(OSError):
        os.chdir(folder)
    torch.set_num_threads(1)
    try:
        return None, function(item)
    except FreebitsError as error:
        return error, None
