"""Draw charts as inline SVG with matplotlib. Labels are SVG text, and axes have the color of the page's text."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from freebits.errors import UsageError, one_line

Points = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Label → x and y coordinates."""
_COLORS = ("#3b82c4", "#d9822b", "#3a9d5d", "#b0559b", "#8a7a3d", "#5f6fd6", "#c0504d", "#4aa3a2")
_INK = "#010203"
"""Placeholder that `_svg` replaces with the color of the page's text."""
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "freebits",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_MAX_LABEL = 40
"""Largest number of characters of a label. Labels contain tensor names, which can be any string."""


def check_charts() -> None:
    """Check that matplotlib is installed.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UsageError("matplotlib, which draws the charts, is not installed: run pip install 'freebits[report]'")


def bars(sizes: Mapping[str, float], unit: str, captions: Mapping[str, str]) -> str:
    """Draw horizontal bars from top to bottom, each with its caption, and return the SVG.

    Args:
        sizes: name → length of the bar, at least one.
        unit: unit of the lengths, for the axis.
        captions: name → caption of the bar.
    """
    names, values = list(sizes), list(sizes.values())

    def draw(axes: Any) -> None:
        drawn = axes.barh(range(len(names)), values, color=_COLORS[0], height=0.62)
        axes.bar_label(drawn, [captions[name] for name in names], padding=4)
        axes.set_yticks(range(len(names)), [_label(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3 * max(values))
        axes.set_xlabel(unit)

    return _svg(0.5 + 0.34 * len(sizes), draw)


def scatter(points: Points, x_title: str, y_title: str, *, names: bool = False, log: bool = False) -> str:
    """Draw dots with one color per label, and return the SVG. Labels are in a legend or, with `names`, next to dots."""

    def draw(axes: Any) -> None:
        for color, (label, (x, y)) in zip(_COLORS * len(points), points.items(), strict=False):
            axes.plot(x, y, "o", markersize=7 if names else 3.5, color=color, label=_label(label), alpha=0.85)
            if names:
                axes.annotate(_label(label), (x[0], y[0]), xytext=(7, 5), textcoords="offset points")
        axes.set(xlabel=x_title, ylabel=y_title)
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if high < 1000 * low else (1,))
            axes.yaxis.set_major_formatter("{x:g}")  # the default formatter writes mathtext
            axes.yaxis.set_minor_formatter("")
        if not names:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.5)
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.12 if names else 0.03, y=0.15)
        axes.grid(visible=True, alpha=0.25)

    return _svg(2.9, draw)


def _label(text: str) -> str:
    """Return a safe, short label. Pad a label that begins with `_`, because matplotlib omits such labels in legends."""
    short = one_line(text, _MAX_LABEL)
    return f"\u2009{short}" if short.startswith("_") else short


def _svg(height: float, draw: Callable[[Any], None]) -> str:
    """Return the SVG of what `draw` draws on axes. Text and axes have the color of the page's text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font may lack glyphs, but the browser uses another font
        figure = Figure(figsize=(5.6, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL).replace(
        _INK, "currentColor"
    )
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    return re.sub(r"<svg [^>]*>", f'<svg viewBox="{view_box[1] if view_box else ""}" role="img">', svg, count=1)
