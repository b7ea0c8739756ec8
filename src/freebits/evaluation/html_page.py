"""Render the HTML report of a model's folder. It has no scripts and needs no network."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from freebits.errors import one_line
from freebits.evaluation import charts
from freebits.evaluation.folder_sizes import change
from freebits.packed.manifest import recorded_sizes

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1d21; --paper: #fff; --soft: #67707b; --line: #d9dde2; --card: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #14171a; --soft: #9aa3ad; --line: #343a41; --card: #1e2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 48rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem; }
p, figcaption { color: var(--soft); margin: .3rem 0 .8rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.35rem; }
.facts span { color: var(--soft); font-size: .85rem; }
figure { margin: 0; }
.wide { overflow-x: auto; }
svg { width: 100%; max-width: 38rem; height: auto; color: var(--ink); font-family: inherit; }
svg text { fill: currentColor; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""
_SHOWN = ("transform", "fidelity", "bytes", "producer", "perplexity")
"""Fields of a history entry that `_history` does not list among the options."""


def page(title: str, facts: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """Return the page as HTML.

    Args:
        title: heading of the page.
        facts: the result of `inspect`.
        measured: `size`, the bytes of the folder; `bits`, name of a matrix → bits per weight; and `places`, name of a
            tensor → block and role. If the folder was compared with its original model, also `errors`, name of a matrix
            → relative error; `against`, the result of `compare_models`; `text`, a description of the text; and
            `rounded`, bits → result of `compare_models` for the rounded original model.
    """
    sections = [_facts(facts, measured), *_sizes(facts), *_quality(measured), *_matrices(measured), *_sites(facts)]
    sections += _history(facts)
    body = "\n".join(sections)
    heading = _safe(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{heading}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{heading}</h1>\n{body}\n</body>\n</html>\n"
    )


def _safe(text: object) -> str:
    """Return a text in one line, escaped for HTML, because texts from a folder can be any string."""
    return html.escape(one_line(text))


def _facts(facts: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    sizes = facts["bytes"]
    size, dense_size = sizes["packed"] or sizes["sliced"] or sizes["dense"], sizes["dense"]
    figures = [(_bytes(size), "on disk")]
    percent = change(size, dense_size)
    if percent is not None and size != dense_size:
        figures.append((f"{percent:+.1f} %", f"vs {_bytes(dense_size)} dense"))
    figures.append((f"{8 * size / max(1, facts['parameters']):.2f}", "bits per weight"))
    if (against := measured.get("against")) and against["ratio"] is not None:
        figures += [
            (f"{against['ratio']:.4f}", "perplexity / original perplexity"),
            (f"{against['mean_kl']:.2g}", "mean KL, nats per token"),
        ]
    codec = f", codec {facts['codec']}, entropy {facts['entropy']}" if facts["codec"] else ""
    boxes = "".join(f"<div><b>{_safe(value)}</b><span>{_safe(label)}</span></div>" for value, label in figures)
    return f"<p>{_safe(facts['kind'] + ' model' + codec)}</p>\n<div class=facts>{boxes}</div>"


def _sizes(facts: Mapping[str, Any]) -> Iterator[str]:
    groups, earlier = facts["groups"], recorded_sizes(facts["history"])
    total = sum(groups.values())
    sizes = {key: earlier[key] for key in ("dense", "sliced") if key in earlier} | {"now": total}
    first = next(iter(sizes.values()))
    captions = {name: f"{_bytes(size)}  ({size / first:.1%})" for name, size in sizes.items()}
    yield _section("Size, step by step", charts.bars(*_scaled(sizes), captions), "Bytes without the tokenizer.")
    captions = {name: f"{_bytes(size)}  ({size / total:.1%})" for name, size in groups.items()}
    yield _section("What the bytes are for", charts.bars(*_scaled(groups), captions), "")


def _quality(measured: Mapping[str, Any]) -> Iterator[str]:
    against = measured.get("against")
    if not against or against["ratio"] is None:
        return
    perplexity = against["perplexity"]
    rows = [("original", f"{perplexity['reference']:.4f}", "", "")]
    rows.append(("this folder", f"{perplexity['packed']:.4f}", f"{against['ratio']:.5f}", f"{against['mean_kl']:.3g}"))
    unit, scale = _unit(measured["size"])
    points = {"this folder": ([measured["size"] / scale], [max(against["mean_kl"], 1e-9)])}
    for bits, result in measured.get("rounded", {}).items():
        perplexity = result["perplexity"]
        rows.append(
            (f"{bits} bits", f"{perplexity['packed']:.4f}", f"{result['ratio']:.5f}", f"{result['mean_kl']:.3g}")
        )
        points[f"{bits} bits"] = ([result["size"] / scale], [max(result["mean_kl"], 1e-9)])
    chart = charts.scatter(points, unit, "mean KL, nats per token", names=True, log=True)
    note = (
        f"Measured on {measured['text']} against the original model. For comparison, the chart includes the original "
        "model with every matrix rounded to 8 and to 4 bits, in groups of 32 with a 16-bit scale, as in common "
        "quantized files. These rounded models are not written; their sizes are computed."
    )
    yield _section("Quality", chart, note) + _table(("model", "perplexity", "ratio", "mean KL"), rows)


def _matrices(measured: Mapping[str, Any]) -> Iterator[str]:
    places = measured["places"]
    for key, title, y_title, note in (
        (
            "bits",
            "Bits of each matrix",
            "bits per weight",
            "Stored bits of a matrix divided by its number of weights.",
        ),
        (
            "errors",
            "Error of each matrix",
            "error / norm",
            "Frobenius norm of the difference from the original matrix, divided by the norm of the original matrix.",
        ),
    ):
        if values := measured.get(key):
            points: dict[str, tuple[list[float], list[float]]] = {}
            for name, value in sorted(values.items(), key=lambda item: places[item[0]][1]):
                block, role = places[name]
                x, y = points.setdefault(role, ([], []))
                x.append(block)
                y.append(value)
            yield _section(title, charts.scatter(points, "block (-1: in no block)", y_title), note)


def _sites(facts: Mapping[str, Any]) -> Iterator[str]:
    """State how many rotations of the residual stream are encoded, and list the other rotations with the reasons."""
    sites = facts["sites"]
    if not sites:
        return
    coded = sum("code" in site for site in sites)
    rows = [(site.get("name"), site.get("reason")) for site in sites if "code" not in site]
    table = _table(("stored plain", "reason"), rows) if rows else ""
    yield f"<h2>Rotations of the residual stream</h2><p>{coded} of {len(sites)} are encoded.</p>{table}"


def _history(facts: Mapping[str, Any]) -> Iterator[str]:
    if not facts["history"]:
        return
    lines = []
    for transform in facts["history"]:
        options = " ".join(f"{key}={transform[key]}" for key in transform if key not in _SHOWN)
        lines.append(
            f"{transform.get('transform')} ({transform.get('fidelity')}): {options}  [{transform.get('producer')}]"
        )
        if isinstance(transform.get("perplexity"), dict):
            perplexities = ", ".join(f"{name} {value}" for name, value in transform["perplexity"].items())
            lines.append(f"    perplexity on held-out text: {perplexities}")
    steps = "\n".join(_safe(line) for line in lines)
    note = "The steps that made the folder, oldest first, each with its settings and measurements."
    yield f"<h2>How it was made</h2><p>{note}</p><pre>{steps}</pre>"


def _section(title: str, chart: str, note: str) -> str:
    caption = f"<figcaption>{html.escape(note)}</figcaption>" if note else ""
    return f"<h2>{html.escape(title)}</h2>\n<figure><div class=wide>{chart}</div>{caption}</figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = ("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _scaled(sizes: Mapping[str, float]) -> tuple[dict[str, float], str]:
    """Return sizes in a unit that suits the largest, and the name of the unit."""
    unit, scale = _unit(max(sizes.values()))
    return {name: size / scale for name, size in sizes.items()}, unit


def _unit(size: float) -> tuple[str, float]:
    """Return the name and the bytes of the largest unit that is at most `size`."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
    return next((unit, scale) for unit, scale in units if size >= scale or scale == 1)


def _bytes(size: float) -> str:
    unit, scale = _unit(size)
    return f"{size / scale:.{2 if scale > 1 else 0}f} {unit}"
