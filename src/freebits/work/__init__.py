"""How work is spread over threads, and how it tells how far it is."""

from freebits.work.progress import Progress, silent
from freebits.work.threads import ordered_map, workers

__all__ = ["Progress", "ordered_map", "silent", "workers"]
