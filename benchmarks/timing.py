"""Time steps in interleaved runs, so that other load on the machine affects all of them equally."""

import time
from collections.abc import Callable, Mapping


def interleaved(steps: Mapping[str, Callable[[], object]], runs: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Return the seconds of each step in `runs` rounds; with `warm`, an extra first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs + warm):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    return {name: values[warm:] for name, values in seconds.items()}


def timed(step: Callable[[], object]) -> float:
    """Return the seconds of a step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
