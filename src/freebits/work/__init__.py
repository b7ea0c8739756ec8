"""How work is spread over threads and machines, how it is found again after a stop, and how it tells how far it is."""

from freebits.work.crew import Crew
from freebits.work.desk import Cleared, Desk
from freebits.work.devices import device_of
from freebits.work.progress import Progress, silent
from freebits.work.saved import kept
from freebits.work.team import Team
from freebits.work.threads import ordered_map, workers

__all__ = [
    "Cleared",
    "Crew",
    "Desk",
    "Progress",
    "Team",
    "device_of",
    "kept",
    "ordered_map",
    "silent",
    "workers",
]
