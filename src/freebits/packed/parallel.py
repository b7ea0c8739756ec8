"""Work on several blocks at once, in order, with few of them in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from freebits.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def workers(jobs: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool of `jobs` threads that share the processors; by default one a processor, at most four.

    Raises:
        UsageError: `jobs` is less than one.
    """
    n_processors = os.cpu_count() or 1
    jobs = min(4, n_processors) if jobs is None else jobs
    if jobs < 1:
        raise UsageError(f"jobs {jobs}: give at least one")
    n_threads, per_job = torch.get_num_threads(), max(1, n_processors // jobs)
    try:
        with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(per_job,)) as executor:
            yield executor
    finally:
        torch.set_num_threads(n_threads)  # new threads take over what was set last, in whichever thread


def ordered_map(
    executor: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`map(function, items)` with as many results under way as there are workers, and one waiting for each."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        if len(pending) == 2 * executor._max_workers:
            yield pending.popleft().result()
        pending.append(executor.submit(function, item))
    while pending:
        yield pending.popleft().result()
