"""Run pieces of work in parallel, on threads of this process or on Ray, through one interface.

A piece is one call of a function with one item.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from freebits.errors import UsageError
from freebits.execution.ray_workers import ray_workers
from freebits.options import BACKENDS, RAY, THREADS

_MAX_PENDING_BYTES = 2**28
_lock = threading.Lock()
_open_pools: list[int] = []
"""Empty if no pool is open; otherwise PyTorch's initial number of threads, and this number again for each pool."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Calls a function with many items in parallel."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in the order of the items, each result as soon as it and all earlier results are finished.

        Each result must depend only on its item, because any thread or worker may compute the result.
        """

    def map_large(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Do the same as `map` for items so large that a process should run only one item at a time."""


@dataclass(frozen=True)
class Parallel:
    """Options for parallel execution.

    Attributes:
        jobs: number of threads, each of which runs one piece at a time; see `threads` for the default. Ray ignores
            `jobs`.
        backend: `threads` for threads of this process, or `ray`.
        address: HOST:PORT of a Ray cluster. By default, a cluster that runs on this machine is used; if there is none,
            a new one is started.

    Raises:
        UsageError: there is no such backend, or `jobs` is less than 1.
    """

    jobs: int | None = None
    backend: str = THREADS
    address: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"`backend` is {self.backend!r}: choose {' or '.join(BACKENDS)}")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"`jobs` is {self.jobs}: give at least 1")

    @contextmanager
    def executor(self, piece: int = 0) -> Iterator[Executor]:
        """Provide an executor until the `with` block ends.

        Args:
            piece: size in bytes of the matrices of one piece; see `threads`.
        """
        with ray_workers(self.address) if self.backend == RAY else threads(self.jobs, piece) as executor:
            yield executor


class Threads:
    """Threads of this process; implements `Executor`."""

    def __init__(self, pool: ThreadPoolExecutor, size: int) -> None:
        self._pool = pool
        self._size = size

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        """See `Executor`. Each thread runs one piece at a time, and one more piece waits.

        The calling thread runs the last item after all other items, because the calling thread can use all of
        PyTorch's threads. If the pool has one thread, the calling thread runs all items.
        """
        if self._size == 1:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        last: list[Item] = []
        for item in items:
            if len(pending) > self._size:
                yield pending.popleft().result()
            pending.extend(self._pool.submit(function, previous) for previous in last)
            last = [item]
        while pending:
            yield pending.popleft().result()
        yield from map(function, last)

    def map_large(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See `Executor`. The calling thread runs the items one after another."""
        return map(function, items)


@contextmanager
def threads(jobs: int | None, piece: int = 0) -> Iterator[Threads]:
    """Provide a pool of threads until the `with` block ends. PyTorch's threads are divided among these threads.

    By default, large matrices get fewer jobs, because one large matrix keeps all of PyTorch's threads busy, and fewer
    matrices at once need less memory (`benchmarks/scale.py --jobs`).

    Args:
        jobs: number of threads. The default is the smallest of these numbers, but at least 1: the number of PyTorch's
            threads (`OMP_NUM_THREADS`, `torch.set_num_threads`), the number of processors that this process is allowed
            to use, 4, and the number of pieces that fit into 256 MiB.
        piece: size in bytes of the matrices of one piece.

    Raises:
        UsageError: `jobs` is less than 1.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"`jobs` is {jobs}: give at least 1")
    with _lock:
        if not _open_pools:
            _open_pools.append(torch.get_num_threads())
        _open_pools.append(_open_pools[0])
        n_threads = _open_pools[0]
    available = min(n_threads, _n_processors())
    jobs = jobs or max(1, min(4, available, _MAX_PENDING_BYTES // max(1, piece)))
    try:
        per_job = max(1, available // jobs)
        with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(per_job,)) as pool:
            yield Threads(pool, jobs)
    finally:
        with _lock:
            _open_pools.pop()
            if len(_open_pools) == 1:  # restored, because new threads start with the number that was set last
                torch.set_num_threads(_open_pools.pop())


def _n_processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # counts only the processors that this process is allowed to use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
