"""How work is spread over threads and machines, how it is found again after a stop, and how it reports progress."""

from freebits.work.devices import device_of
from freebits.work.executor import Executor, Parallel, threads
from freebits.work.finished import Work, WorkStore
from freebits.work.memory import physical_memory, release_freed_memory
from freebits.work.progress import Progress, silent
from freebits.work.saved import kept

__all__ = [
    "Executor",
    "Parallel",
    "Progress",
    "Work",
    "WorkStore",
    "device_of",
    "kept",
    "physical_memory",
    "release_freed_memory",
    "silent",
    "threads",
]
