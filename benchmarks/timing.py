"""Seconds of steps that take turns, so that what else the machine does hits all of them alike."""

import time
from collections.abc import Callable, Mapping


def interleaved(steps: Mapping[str, Callable[[], object]], runs: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each step in each of so many rounds; a first round more is not counted where caches shall be warm."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs + warm):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    return {name: values[warm:] for name, values in seconds.items()}


def timed(step: Callable[[], object]) -> float:
    """Seconds that a step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
