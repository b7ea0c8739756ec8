"""Work on several blocks at once, in order, with few of them in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from freebits.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")


def workers(jobs: int | None) -> ThreadPoolExecutor:
    """A pool of `jobs` threads that share the processors; by default one a processor, at most four.

    Raises:
        UsageError: `jobs` is less than one.
    """
    n_processors = os.cpu_count() or 1
    jobs = min(4, n_processors) if jobs is None else jobs
    if jobs < 1:
        raise UsageError(f"jobs {jobs}: give at least one")
    threads = max(1, n_processors // jobs)
    return ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(threads,))


def ordered_map(
    executor: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`map(function, items)` with as many results under way or waiting as there are workers."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        if len(pending) == executor._max_workers:
            yield pending.popleft().result()
        pending.append(executor.submit(function, item))
    while pending:
        yield pending.popleft().result()
