"""Work on several pieces at once, in order, with few of them in memory."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from freebits.errors import UsageError

_AT_ONCE = 2**28
_lock = threading.Lock()
_open_pools: list[int] = []
"""PyTorch's threads before any pool was open, and once more for each that is."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def workers(jobs: int | None, piece: int = 0) -> Iterator[ThreadPoolExecutor]:
    """A pool of `jobs` threads, by default one for each of PyTorch's, at most four, which are divided among them.

    PyTorch has as many as it was told (`OMP_NUM_THREADS`, `torch.set_num_threads`), by default one a core; they count
    only as far as this process may run on so many processors. Pieces that are linear algebra on so many bytes are by
    default as many at once as have 256 MB together, but one: large matrices keep all threads busy alone, in less memory
    (`benchmarks/scale.py --jobs`).

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
        with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(per_job,)) as executor:
            yield executor
    finally:
        with _lock:
            _open_pools.pop()
            if len(_open_pools) == 1:  # new threads take over what was set last, in whichever thread
                torch.set_num_threads(_open_pools.pop())


def ordered_map(
    executor: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Generator[Result, None, None]:
    """`map(function, items)` with as many results under way as there are workers, and one waiting.

    The last item is left to the calling thread, which has all of PyTorch's threads, once the others are done; where
    there is one worker, all of them are.
    """
    if executor._max_workers == 1:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    held: list[Item] = []
    for item in items:
        if len(pending) > executor._max_workers:
            yield pending.popleft().result()
        pending.extend(executor.submit(function, before) for before in held)
        held = [item]
    while pending:
        yield pending.popleft().result()
    yield from map(function, held)


def _n_processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # where a process can be confined to some
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
