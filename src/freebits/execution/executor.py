"""Who runs pieces of work: threads of this process, or workers of Ray. Both are one `map`."""

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

_AT_ONCE = 2**28
_lock = threading.Lock()
_open_pools: list[int] = []
"""PyTorch's threads before any pool was open, and once more for each pool that is."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs a function on many items, several at once."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results in the order of the items, each as soon as it and those before it are finished.

        A result depends on nothing but its item, so it does not matter who finds it.
        """

    def map_large(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The same for items each of which fills a machine: only one at a time on each."""


@dataclass(frozen=True)
class Parallel:
    """Where work runs.

    Attributes:
        jobs: pieces at once; by default one for each of PyTorch's threads, at most four, and fewer of large pieces.
        backend: `threads` of this process, or `ray`.
        address: HOST:PORT of a Ray cluster; by default the one that runs on this machine, else a new one.

    Raises:
        UsageError: there is no such backend, or `jobs` is less than one.
    """

    jobs: int | None = None
    backend: str = THREADS
    address: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"there is no backend {self.backend!r}: choose one of {', '.join(BACKENDS)}")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs {self.jobs}: give at least one")

    @contextmanager
    def executor(self, piece: int = 0) -> Iterator[Executor]:
        """The executor, for as long as this lasts.

        Args:
            piece: bytes of linear algebra in a piece, see `threads`.
        """
        with ray_workers(self.address) if self.backend == RAY else threads(self.jobs, piece) as executor:
            yield executor


class Threads:
    """Threads of this process; implements `Executor`."""

    def __init__(self, pool: ThreadPoolExecutor, size: int) -> None:
        self._pool = pool
        self._size = size

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        """As many pieces at once as there are threads, and one waiting.

        The last item is left to the calling thread, which has all of PyTorch's threads, once the others are done; where
        there is one thread in the pool, all of them are.
        """
        if self._size == 1:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        held: list[Item] = []
        for item in items:
            if len(pending) > self._size:
                yield pending.popleft().result()
            pending.extend(self._pool.submit(function, before) for before in held)
            held = [item]
        while pending:
            yield pending.popleft().result()
        yield from map(function, held)

    def map_large(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """One after another, in the calling thread."""
        return map(function, items)


@contextmanager
def threads(jobs: int | None, piece: int = 0) -> Iterator[Threads]:
    """A pool of `jobs` threads, by default one for each of PyTorch's, at most four, which are divided among them.

    PyTorch has as many as it was told (`OMP_NUM_THREADS`, `torch.set_num_threads`), by default one a core; they count
    only as far as this process may run on so many processors. Pieces of linear algebra on `piece` bytes are by default
    as many at once as have 256 MB together, but at least one: large matrices keep all threads busy alone, in less
    memory (`benchmarks/scale.py --jobs`).

    Raises:
        UsageError: `jobs` is less than one.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs {jobs}: give at least one")
    with _lock:
        if not _open_pools:
            _open_pools.append(torch.get_num_threads())
        _open_pools.append(_open_pools[0])
        n_threads = _open_pools[0]
    available = min(n_threads, _n_processors())
    jobs = jobs or max(1, min(4, available, _AT_ONCE // max(1, piece)))
    try:
        per_job = max(1, available // jobs)
        with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(per_job,)) as pool:
            yield Threads(pool, jobs)
    finally:
        with _lock:
            _open_pools.pop()
            if len(_open_pools) == 1:  # new threads take over what was set last, in whichever thread
                torch.set_num_threads(_open_pools.pop())


def _n_processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # where a process can be confined to some
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
