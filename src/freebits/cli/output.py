"""Tables, JSON and progress bars."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from tqdm import tqdm

from freebits.errors import one_line
from freebits.evaluation.sizes import change
from freebits.execution.progress import Progress, silent
from freebits.transforms.transform import BIT_EXACT

Row = tuple[str, ...]


def print_json(result: dict[str, Any]) -> int:
    """Print one object on stdout; the exit code."""
    print(json.dumps(_without_infinities(result), allow_nan=False))
    return 0


def _without_infinities(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _without_infinities(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_facts(facts: dict[str, Any], as_json: bool) -> int:
    """Print what `inspect` says; the exit code."""
    if as_json:
        return print_json(facts)
    codec = f", codec {facts['codec']}, entropy {facts['entropy']}" if facts["codec"] else ""
    print(one_line(f"{facts['kind']} checkpoint{codec}"))
    sizes = facts["bytes"]
    rows: list[Row] = [("size", "bytes", "vs dense", "vs dense untied")]
    for name, size in sizes.items():
        if size is not None and name != "corrections":
            rows.append((name.replace("_", " "), f"{size:,}", *changes(size, sizes)))
    print_table(rows)
    print(f"\n{facts['parameters']:,} parameters as it runs")
    total = sum(facts["groups"].values())
    print_table([(group, f"{size:,}", f"{size / total:.1%}") for group, size in facts["groups"].items()])
    if facts["sites"]:
        coded = [site for site in facts["sites"] if "code" in site]
        n_corrections = sum(site.get("corrections", 0) for site in coded)
        corrected = f"; {n_corrections:,} corrected words" if n_corrections else ""
        print(f"{len(coded)} of {len(facts['sites'])} sites encoded{corrected}")
    for site in facts["sites"]:
        if "code" not in site:
            print(one_line(f"stored plain: {site.get('name')}: {site.get('reason')}"))
    for move in facts["history"]:
        print(one_line(f"{move.get('move')} ({move.get('fidelity')}), {move.get('producer')}"))
    if coverage := facts.get("coverage"):
        print_coverage(coverage)
    if perplexity := facts.get("perplexity"):
        _print_cost(perplexity)
    if kl := facts.get("kl"):
        print(f"\nmean KL {kl['before']:.4f} nats a token before, {kl['after']:.4f} after, on windows not trained on")
    return 0


def print_components(result: dict[str, Any]) -> int:
    """Print what became of each model of a pipeline; the exit code."""
    rows: list[Row] = [("model", "bytes before", "after", "how")]
    for name, facts in result["components"].items():
        plan = facts["plan"]
        after = facts["bytes"]["packed"] if "bytes" in facts else plan["about"]
        how = plan["way"] if plan["bits"] is None else f"{plan['bits']:g} bits a weight"
        rows.append((name, f"{plan['bytes']:,}", f"{after:,}", how))
    print_table(rows)
    return 0


def print_plan(plan: dict[str, Any]) -> None:
    """Print what `compress` does."""
    size, most = plan["about"], plan["at_most"]
    if plan["way"] == "lossless":
        what = f"every bit kept, about {size:,} bytes"
    elif plan["bits"] is not None:
        what = f"integers of {plan['bits']:g} bits on average, about {size:,} bytes"
    elif most is not None:
        what = f"integers, as fine as {most:,} bytes allow"
    else:
        what = f"integers, as coarse as a mean KL divergence of {plan['max_kl']:g} nats a token allows"
    print(one_line(f"plan: {plan['model']}, {plan['bytes']:,} bytes: {what}"))


def print_fidelity(measured: dict[str, Any]) -> None:
    """Print how near a model is to what it was made of."""
    if measured["fidelity"] == BIT_EXACT:
        print("\nbit-exact: every tensor equals the original's")
        return
    if measured["mean_kl"] is None:
        print(
            f"\nrounded weights differ by {measured['weight_error']:.2%} (root mean square); no text measures the model"
        )
        return
    perplexity = measured["perplexity"]
    print(
        f"\non {measured['text']}: perplexity {perplexity['reference']:.3f} before, {perplexity['packed']:.3f} after "
        f"(x {measured['ratio']:.4f}); mean KL {measured['mean_kl']:.4f} nats a token"
    )


def print_coverage(coverage: dict[str, Any]) -> None:
    """Print which share of the weights was quantized; if it is not nearly all, what was not, and why."""
    print(f"\n{coverage['share']:.1%} of the weights are quantized")
    if coverage["share"] < _NEARLY_ALL:
        total = sum(left["weights"] for left in coverage["left"]) / (1 - coverage["share"])
        for left in coverage["left"]:
            if left["weights"] > _WORTH_A_LINE * total:
                share = left["weights"] / total
                print(one_line(f"not quantized: {left['tensors']} ({share:.1%} of the weights): {left['reason']}"))
    if coverage["uncalibrated"] > _WORTH_A_LINE:
        names = ", ".join(alone["tensors"] for alone in coverage["alone"])
        print(one_line(f"{coverage['uncalibrated']:.1%} are rounded by their weights alone: {names}", 200))
    if coverage.get("thin"):
        print(
            f"{coverage['thin']} of {coverage['experts']} matrices of experts multiplied fewer than 64 tokens of the "
            "calibration text: they are rounded as the average expert of their block; more --samples measure them"
        )


_NEARLY_ALL, _WORTH_A_LINE = 0.98, 0.001


def print_ladder(result: dict[str, Any]) -> None:
    """Print about what freebits makes of a model."""
    dense = result["bytes"]["dense"]
    print(f"about what freebits makes of it, from {result['dtype']}")
    rows: list[Row] = [("", "bytes", "of dense")]
    print_table(rows + [(name, f"{size:,}", f"{size / dense:.0%}") for name, size in result["bytes"].items()])


def _print_cost(perplexity: dict[str, float | None]) -> None:
    """What slicing or reducing cost, where that could be measured."""
    (_, before), (name, after) = perplexity.items()
    if before and after:
        cost = f"perplexity {before:.3f} before, {after:.3f} {name} (x {after / before:.3f})"
        print(f"\n{cost} on held-out windows of the calibration text; other text may suffer more: freebits eval")


def changes(size: int, baselines: dict[str, int | None]) -> Row:
    """Change against both baselines, as table cells."""
    percents = (change(size, baselines[key]) for key in ("dense", "dense_untied"))
    return tuple("" if percent is None else f"{percent:+.2f} %" for percent in percents)


def print_table(rows: list[Row]) -> None:
    """Print aligned columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


_log = logging.getLogger("freebits")
_LINES_EVERY = 10.0
"""Seconds between two lines for a log."""


@contextmanager
def speaking(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Say nothing but errors, or lines for a log, for as long as this lasts."""
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


def announce(line: str) -> None:
    """Print a line on stderr at once, also where nobody watches; nothing if only errors are wanted."""
    if _log.isEnabledFor(logging.WARNING):
        print(line, file=sys.stderr, flush=True)


def progress_bar(step: str) -> Progress:
    """A bar on stderr for a step that takes over a second; silent where nobody watches, unless lines are wanted."""
    if _log.isEnabledFor(logging.INFO):
        return _progress_lines(step)
    if not _log.isEnabledFor(logging.WARNING):
        return silent

    def new() -> Any:
        return tqdm(desc=step, disable=None, leave=False, delay=1, file=sys.stderr)

    bar = new()

    def show(done: int, total: int) -> None:
        nonlocal bar
        if done < bar.n:  # the next part of the step
            bar = new()
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def _progress_lines(step: str) -> Progress:
    """A line every ten seconds, and one at the end."""
    said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        if done == total or time.monotonic() - said > _LINES_EVERY:
            said = time.monotonic()
            _log.info("%s: %d of %d", step, done, total)

    return show
