"""Show progress as bars in a terminal or as lines in a log, and set how much a command prints."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

from tqdm import tqdm

from freebits.execution.progress import Progress, silent

_log = logging.getLogger("freebits")
_SECONDS_BETWEEN_LINES = 10.0
_BAR = "{desc}, {unit} {n} of {total} |{bar:20}| {remaining} left"
_BYTE_BAR = "{desc}, {n_fmt} of {total_fmt}B |{bar:20}| {remaining} left"


@contextmanager
def verbosity(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Until the `with` block ends, print only errors if `quiet` is set, or log lines with times if `verbose` is set."""
    import transformers  # to hide its messages and progress bars: freebits has its own

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    handler = logging.StreamHandler(sys.stderr) if verbose else None
    if handler:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        _log.addHandler(handler)
    _log.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.NOTSET)
    try:
        with (
            Path(os.devnull).open("w", encoding="utf-8", errors="replace") if quiet else nullcontext(sys.stdout) as out,
            redirect_stdout(out),
        ):
            yield
    finally:
        _log.setLevel(logging.NOTSET)
        if handler:
            _log.removeHandler(handler)


def progress_bar() -> Progress:
    """Return a callback that shows progress: as bars in a terminal, as log lines with `--verbose`, else not at all."""
    if _log.isEnabledFor(logging.INFO):
        return _lines()
    return _bars() if _log.isEnabledFor(logging.WARNING) else silent


def _bars() -> Progress:
    """Return a callback that shows a bar for each activity that takes over a second."""
    bar: tqdm | None = None  # type: ignore[type-arg]
    name = ""

    def show(activity: str, unit: str, done: int, total: int) -> None:
        nonlocal bar, name
        if bar is None or activity != name or done < bar.n:  # a new activity begins
            if bar is not None:
                bar.close()
            in_bytes = unit == "byte"
            bar = tqdm(
                desc=activity,
                unit=unit,
                unit_scale=in_bytes,
                bar_format=_BYTE_BAR if in_bytes else _BAR,
                disable=None,
                leave=False,
                delay=1,
                file=sys.stderr,
            )
            name = activity
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()
            bar = None

    return show


def _lines() -> Progress:
    """Return a callback that logs a line every ten seconds, and the duration of each activity when it ends."""
    begin = last = time.monotonic()
    name = ""

    def show(activity: str, unit: str, done: int, total: int) -> None:
        nonlocal begin, last, name
        now = time.monotonic()
        if activity != name:
            name, begin = activity, now if name else begin
        if done == total:
            _log.info("%s: done in %.1f s", activity, now - begin)
            begin, name = now, ""
        elif now - last > _SECONDS_BETWEEN_LINES:
            last = now
            seconds_left = (now - begin) * (total - done) / max(1, done)
            amount = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB" if unit == "byte" else f"{unit} {done} of {total}"
            _log.info("%s, %s, %.0f s left", activity, amount, seconds_left)

    return show
