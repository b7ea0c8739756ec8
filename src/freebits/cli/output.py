"""Print results as tables for people or as JSON for programs. All imports of this module are fast."""

import json
import math
from typing import Any

from freebits.errors import one_line
from freebits.options import BIT_EXACT

Row = tuple[str, ...]


def print_json(result: dict[str, Any]) -> int:
    """Print one JSON object on stdout, and return the exit code."""
    print(json.dumps(_without_infinities(result), allow_nan=False))
    return 0


def _without_infinities(value: Any) -> Any:
    """Replace NaN and infinities by None, because JSON lacks them."""
    if isinstance(value, dict):
        return {key: _without_infinities(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_facts(facts: dict[str, Any], as_json: bool) -> int:
    """Print the result of `inspect` or of a command that writes a folder, and return the exit code."""
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
    print(f"\n{facts['parameters']:,} parameters when loaded")
    total = sum(facts["groups"].values())
    print_table([(group, f"{size:,}", f"{size / total:.1%}") for group, size in facts["groups"].items()])
    if facts["sites"]:
        coded = [site for site in facts["sites"] if "code" in site]
        n_corrections = sum(site.get("corrections", 0) for site in coded)
        corrected = f"; {n_corrections:,} corrected values" if n_corrections else ""
        print(f"{len(coded)} of {len(facts['sites'])} rotations of the residual stream encoded{corrected}")
    for site in facts["sites"]:
        if "code" not in site:
            print(one_line(f"stored plain: {site.get('name')}: {site.get('reason')}"))
    if base := facts.get("base"):
        chain = ", which needs ".join(base["chain"])
        print(one_line(f"needs {base['tensors']:,} tensors of its base {chain}"))
    for entry in facts["history"]:
        print(one_line(f"{entry.get('transform')} ({entry.get('fidelity')}), {entry.get('producer')}"))
    if coverage := facts.get("coverage"):
        print_coverage(coverage)
    if perplexity := facts.get("perplexity"):
        _print_perplexity(perplexity)
    if kl := facts.get("kl"):
        change = f"{kl['before']:.4f} nats per token before, {kl['after']:.4f} after"
        print(f"\nmean KL {change}, on windows that were not used for training")
    return 0


def print_series(result: dict[str, Any], as_json: bool) -> int:
    """Print the result of packing several models, and return the exit code."""
    if as_json:
        return print_json(result)
    rows: list[Row] = [("model", "bytes before", "bytes after", "base")]
    for name, facts in result["models"].items():
        before, after = facts["bytes"]["dense"], facts["bytes"]["packed"]
        base = facts["base"]["chain"][0] if "base" in facts else ""
        rows.append((one_line(name), f"{before or 0:,}", f"{after:,}", one_line(base)))
    return print_table(rows)


def print_components(result: dict[str, Any]) -> int:
    """Print the result for each model of a pipeline, and return the exit code."""
    rows: list[Row] = [("model", "bytes before", "bytes after", "method")]
    for name, facts in result["components"].items():
        plan = facts["plan"]
        after = facts["bytes"]["packed"] if "bytes" in facts else plan["about"]
        method = plan["way"] if plan["bits"] is None else f"{plan['bits']:g} bits per weight"
        rows.append((name, f"{plan['bytes']:,}", "" if after is None else f"{after:,}", method))
    return print_table(rows)


def print_plan(plan: dict[str, Any]) -> None:
    """Print a plan of `compress` in one line."""
    size, max_size = plan["about"], plan["at_most"]
    if plan["way"] == "lossless":
        action = f"keep every bit, about {size:,} bytes"
    elif plan["bits"] is not None:
        action = f"quantize to {plan['bits']:g} bits per weight on average, about {size:,} bytes"
    elif max_size is not None:
        action = f"quantize to at most {max_size:,} bytes"
    else:
        action = f"quantize to a mean KL divergence of at most {plan['max_kl']:g} nats per token"
    print(one_line(f"plan: {plan['model']}, {plan['bytes']:,} bytes: {action}"))


def print_fidelity(measured: dict[str, Any]) -> None:
    """Print how close a result is to the original model."""
    if measured["fidelity"] == BIT_EXACT:
        print("\nbit-exact: every tensor equals the original tensor")
        return
    if measured["mean_kl"] is None:
        print(
            f"\nthe rounded weights differ from the original weights by {measured['weight_error']:.2%} (root mean "
            "square); quality was not measured, because transformers cannot run this model on text"
        )
        return
    perplexity = measured["perplexity"]
    print(
        f"\non {measured['text']}: perplexity {perplexity['reference']:.3f} before, {perplexity['packed']:.3f} after "
        f"(x {measured['ratio']:.4f}); mean KL {measured['mean_kl']:.4f} nats per token"
    )


def print_coverage(coverage: dict[str, Any]) -> None:
    """Print the share of quantized weights, and the tensors that are rounded without calibration.

    If the share is below 98 %, also print the tensors that are not quantized, each with the reason. Leave out entries
    with at most 0.1 % of the weights.
    """
    print(f"\n{coverage['share']:.1%} of the weights are quantized")
    if coverage["share"] < _FULL_COVERAGE:
        total = sum(entry["weights"] for entry in coverage["left"]) / (1 - coverage["share"])
        for entry in coverage["left"]:
            if entry["weights"] > _MIN_SHARE * total:
                share = entry["weights"] / total
                print(one_line(f"not quantized: {entry['tensors']} ({share:.1%} of the weights): {entry['reason']}"))
    if coverage["uncalibrated"] > _MIN_SHARE:
        names = ", ".join(entry["tensors"] for entry in coverage["alone"])
        print(one_line(f"{coverage['uncalibrated']:.1%} of the weights are rounded without calibration: {names}", 200))
    if coverage.get("undersampled"):
        print(
            f"{coverage['undersampled']} of {coverage['experts']} expert matrices received fewer than 64 tokens of the "
            "calibration text, so their rounding relies on the average expert of their block: calibrate on more text"
        )


_FULL_COVERAGE, _MIN_SHARE = 0.98, 0.001
"""Fractions of the weights: see `print_coverage`."""


def print_size_table(result: dict[str, Any]) -> int:
    """Print the approximate size of each form of a model, and return the exit code."""
    dense = result["bytes"]["dense"]
    print(f"approximate sizes; the dense model is in {result['dtype']}")
    rows: list[Row] = [("", "bytes", "of dense")]
    return print_table(rows + [(name, f"{size:,}", f"{size / dense:.0%}") for name, size in result["bytes"].items()])


def _print_perplexity(perplexity: dict[str, float | None]) -> None:
    """Print the perplexity before and after a lossy command, if it could be measured."""
    (_, before), (name, after) = perplexity.items()
    if before and after:
        change = f"perplexity {before:.3f} before, {after:.3f} {name} (x {after / before:.3f})"
        print(f"\n{change} on held-out windows of the calibration text; run freebits eval to measure on other text")


def changes(size: int, baselines: dict[str, int | None]) -> Row:
    """Return the differences of a size from `dense` and from `dense_untied` in percent, as table cells."""
    pairs = [(size, baselines[key]) for key in ("dense", "dense_untied")]
    return tuple(f"{100 * (size / baseline - 1):+.2f} %" if size and baseline else "" for size, baseline in pairs)


def print_table(rows: list[Row]) -> int:
    """Print a table, and return the exit code. The first column is left-aligned, the others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    return 0
