"""Charts as inline SVG, by matplotlib: text stays text, and lines take the colour of the page's text."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from freebits.errors import UsageError

Points = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Label → horizontal and vertical places."""
_COLOURS = ("#3b82c4", "#d9822b", "#3a9d5d", "#b0559b", "#8a7a3d", "#5f6fd6", "#c0504d", "#4aa3a2")
_INK = "#010203"
"""Stands for the colour of the page's text."""
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "freebits",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def bars(sizes: Mapping[str, float], unit: str, told: Mapping[str, str] | None = None) -> str:
    """Horizontal bars from the top, each with its figure or what is told of it."""
    figure, axes = _figure(0.5 + 0.34 * len(sizes))
    names, values = list(sizes), list(sizes.values())
    drawn = axes.barh(range(len(names)), values, color=_COLOURS[0], height=0.62)
    axes.bar_label(drawn, [(told or {}).get(name, f"{size:,.0f}") for name, size in sizes.items()], padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(values))
    axes.set_xlabel(unit)
    return _svg(figure)


def scatter(points: Points, across: str, up: str, *, names: bool = False, log: bool = False) -> str:
    """Dots by label; with `names` each has its label beside it, else there is a legend."""
    figure, axes = _figure(2.9)
    for colour, (label, (x, y)) in zip(_COLOURS * len(points), points.items(), strict=False):
        axes.plot(x, y, "o", markersize=7 if names else 3.5, color=colour, label=label, alpha=0.85)
        if names and len(x):
            axes.annotate(label, (x[0], y[0]), xytext=(7, 5), textcoords="offset points")
    axes.set(xlabel=across, ylabel=up)
    if log:
        axes.set_yscale("log")
    if not names:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.5, frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.12 if names else 0.03, y=0.15)
    axes.grid(visible=True, alpha=0.25)
    return _svg(figure)


def _figure(height: float) -> tuple[Any, Any]:
    """Figure and axes, which need no screen."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("charts are drawn by matplotlib: pip install 'freebits[report]'") from None
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL).replace(
        _INK, "currentColor"
    )
    size = re.search(r'viewBox="([^"]*)"', svg)
    return re.sub(r"<svg [^>]*>", f'<svg viewBox="{size[1] if size else ""}" role="img">', svg, count=1)
