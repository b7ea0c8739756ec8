"""One page that shows a model's folder: no script, no network, light and dark, on a phone too."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from freebits.errors import one_line
from freebits.evaluation import charts
from freebits.evaluation.sizes import change
from freebits.packed.manifest import sizes_before

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
"""Of a move what is shown elsewhere."""


def page(title: str, facts: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """The page.

    Args:
        title: of the model.
        facts: what `inspect` says of the folder.
        measured: `bits`, name of a matrix → bits per weight, `part` of each, `errors`, and `against`, the result of
            `verify`, with `text` and `coarse`; each may be missing.
    """
    sections = [_facts(facts, measured), *_sizes(facts), *_quality(measured), *_matrices(measured), *_sites(facts)]
    sections += _history(facts)
    body = "\n".join(sections)
    told = _safe(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{told}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{told}</h1>\n{body}\n</body>\n</html>\n"
    )


def _safe(text: object) -> str:
    """What a folder says of itself, which may be anything."""
    return html.escape(one_line(text))


def _facts(facts: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    sizes = facts["bytes"]
    now, before = sizes["packed"] or sizes["sliced"] or sizes["dense"], sizes["dense"]
    told = [(_bytes(now), "on disk")]
    smaller = change(now, before)
    if smaller is not None and now != before:
        told.append((f"{smaller:+.1f} %", f"of {_bytes(before)} dense"))
    told.append((f"{8 * now / max(1, facts['parameters']):.2f}", "bits a parameter as it runs"))
    if (against := measured.get("against")) and against["ratio"] is not None:
        told += [
            (f"{against['ratio']:.4f}", "of its model's perplexity"),
            (f"{against['mean_kl']:.2g}", "mean KL, nats per token"),
        ]
    codec = f", codec {facts['codec']}, entropy {facts['entropy']}" if facts["codec"] else ""
    boxes = "".join(f"<div><b>{_safe(value)}</b><span>{_safe(what)}</span></div>" for value, what in told)
    return f"<p>{_safe(facts['kind'] + ' model' + codec)}</p>\n<div class=facts>{boxes}</div>"


def _sizes(facts: Mapping[str, Any]) -> Iterator[str]:
    now, sizes = sum(facts["groups"].values()), sizes_before(facts["history"])
    sizes = {key: sizes[key] for key in ("dense", "sliced") if key in sizes} | {"now": now}
    first = next(iter(sizes.values()))
    told = {name: f"{_bytes(size)}  ({size / first:.1%})" for name, size in sizes.items()}
    yield _section("Size, step by step", charts.bars(*_scaled(sizes), told), "Bytes on disk, everything counted.")
    groups = facts["groups"]
    told = {name: f"{_bytes(size)}  ({size / now:.1%})" for name, size in groups.items()}
    yield _section("What the bytes are for", charts.bars(*_scaled(groups), told), "")


def _quality(measured: Mapping[str, Any]) -> Iterator[str]:
    against = measured.get("against")
    if not against or against["ratio"] is None:
        return
    perplexity = against["perplexity"]
    rows = [("what it was made from", f"{perplexity['reference']:.4f}", "", "")]
    rows.append(("this folder", f"{perplexity['packed']:.4f}", f"{against['ratio']:.5f}", f"{against['mean_kl']:.3g}"))
    unit, scale = _unit(measured["size"])
    points = {"this folder": ([measured["size"] / scale], [max(against["mean_kl"], 1e-9)])}
    for bits, of in measured.get("coarse", {}).items():
        rows.append((f"{bits} bits", f"{of['perplexity']['packed']:.4f}", f"{of['ratio']:.5f}", f"{of['mean_kl']:.3g}"))
        points[f"{bits} bits"] = ([of["size"] / scale], [max(of["mean_kl"], 1e-9)])
    chart = charts.scatter(points, unit, "mean KL, nats per token", names=True, log=True)
    note = (
        f"Measured on {measured['text']}, beside the model it was made from, and that model with every matrix rounded "
        "to the nearest of 2^b steps in groups of 32 with a 16-bit scale, as common 8-bit and 4-bit files are; the "
        "bytes of those are counted, not written."
    )
    yield _section("Quality", chart, note) + _table(("model", "perplexity", "ratio", "mean KL"), rows)


def _matrices(measured: Mapping[str, Any]) -> Iterator[str]:
    parts = measured["part"]
    for key, title, up, note in (
        (
            "bits",
            "Bits of each matrix",
            "bits per weight",
            "Stored bytes of a matrix by how many numbers it has as it runs.",
        ),
        (
            "errors",
            "Error of each matrix",
            "error, of its norm",
            "How far each matrix is from that of the model it was made from.",
        ),
    ):
        if values := measured.get(key):
            points: dict[str, tuple[list[float], list[float]]] = {}
            for name, value in sorted(values.items(), key=lambda item: parts[item[0]][1]):
                block, role = parts[name]
                x, y = points.setdefault(role, ([], []))
                x.append(block)
                y.append(value)
            yield _section(title, charts.scatter(points, "block (-1: outside of them)", up), note)


def _sites(facts: Mapping[str, Any]) -> Iterator[str]:
    """Which of the free rotations were taken back."""
    sites = facts["sites"]
    if not sites:
        return
    coded = sum("code" in site for site in sites)
    rows = [(site.get("name"), site.get("reason")) for site in sites if "code" not in site]
    table = _table(("stored plain", "reason"), rows) if rows else ""
    yield f"<h2>Sites</h2><p>{coded} of {len(sites)} rotations of the residual stream are taken back.</p>{table}"


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
            lines.append(
                "    perplexity, held out: " + ", ".join(f"{k} {v}" for k, v in transform["perplexity"].items())
            )
    told = "\n".join(_safe(line) for line in lines)
    yield f"<h2>How it was made</h2><p>In this order; with these values the commands repeat it.</p><pre>{told}</pre>"


def _section(title: str, chart: str, note: str) -> str:
    caption = f"<figcaption>{html.escape(note)}</figcaption>" if note else ""
    return f"<h2>{html.escape(title)}</h2>\n<figure><div class=wide>{chart}</div>{caption}</figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = ("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _scaled(sizes: Mapping[str, float]) -> tuple[dict[str, float], str]:
    """Sizes in a unit that suits the largest, and that."""
    unit, of = _unit(max(sizes.values()))
    return {name: size / of for name, size in sizes.items()}, unit


def _unit(size: float) -> tuple[str, float]:
    return next((unit, of) for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)) if size >= of or of == 1)


def _bytes(size: float) -> str:
    unit, of = _unit(size)
    return f"{size / of:.{2 if of > 1 else 0}f} {unit}"
