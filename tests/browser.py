"""Check the page of `freebits report` in Chromium, wide and narrow, with light and dark colors: `make browser`.

    python -m tests.browser [FOLDER]

Needs Chromium. If FOLDER is given, screenshots are saved there.
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import freebits
from tests.tiny import random_text, tiny_model, tiny_tokenizer

WIDTHS = (1200, 400)
SCHEMES = {"light": 1, "dark": 0}
"""Color scheme → its number in Chromium's settings."""
MIN_CONTRAST = 4.5
"""Minimum contrast between text and its background (WCAG 2.2, level AA)."""
MEASURE = """
const frame = document.querySelector('iframe');
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  const charts = [...page.querySelectorAll('svg')].map(chart => chart.getBoundingClientRect());
  const opaque = e => { const c = view.getComputedStyle(e).backgroundColor;
    return /, 0\\)$/.test(c) && e.parentElement ? opaque(e.parentElement) : c; };
  const texts = [...page.querySelectorAll('h1, h2, p, td, th, pre, code, figcaption')].filter(e => e.innerText.trim());
  document.title = JSON.stringify({
    width: view.innerWidth, overflow: root.scrollWidth - view.innerWidth,
    dark: view.matchMedia('(prefers-color-scheme: dark)').matches,
    charts: charts.map(box => [box.left, box.right, box.height]),
    colors: [...new Set(texts.map(e => view.getComputedStyle(e).color + ' on ' + opaque(e)))],
    loaded: view.performance.getEntriesByType('resource').map(entry => entry.name)});
};
"""


def main() -> int:
    """Write a page, open it with each width and color scheme, and print its faults.

    Returns:
        The exit code: 0 without faults, 1 with faults, 2 if Chromium is missing.
    """
    browser = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if browser is None:
        print("Chromium is missing: install chromium or google-chrome")  # noqa: T201
        return 2
    n_faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        page = write_page(Path(scratch))
        for width in WIDTHS:
            for scheme, number in SCHEMES.items():
                options = [f"--blink-settings=preferredColorScheme={number}", f"--user-data-dir={scratch}/profile"]
                measured = measure_page(browser, page, width, options)
                faults = find_faults(measured, width, dark=scheme == "dark")
                n_faults += len(faults)
                print(f"{width} px, {scheme}: {'; '.join(faults) or 'ok'}")  # noqa: T201
                if len(sys.argv) > 1:
                    screenshot = Path(sys.argv[1]).absolute() / f"{scheme}-{width}.png"
                    run(browser, page.with_name("frame.html"), [*options, f"--screenshot={screenshot}"], width)
    return int(bool(n_faults))


def write_page(scratch: Path) -> Path:
    """Write the page of a small quantized model and return its path."""
    tiny_model().half().save_pretrained(scratch / "dense")
    tiny_tokenizer().save_pretrained(scratch / "dense")
    options: dict[str, Any] = {"samples": 4, "seq_len": 32}
    freebits.quantize(scratch / "dense", scratch / "small", bits=5, calibration=random_text(600), **options)
    page = scratch / "page.html"
    freebits.write_report(
        scratch / "small", page, against=scratch / "dense", text=random_text(200), seq_len=32, limit=2
    )
    return page


def measure_page(browser: str, page: Path, width: int, options: list[str]) -> dict[str, Any]:
    """Show a page in a frame of a width in pixels, without network access, and return what `MEASURE` measures."""
    escaped = html.escape(page.read_text(encoding="utf-8"))
    frame = page.with_name("frame.html")
    frame.write_text(
        f"<!doctype html><body style='margin: 0'><iframe style='border: 0; width: {width}px; height: 4000px' "
        f'srcdoc="{escaped}"></iframe><script>{MEASURE}</script>',
        encoding="utf-8",
    )
    dom = run(browser, frame, [*options, "--dump-dom"], width)
    [title] = re.findall(r"<title>(\{.*?\})</title>", dom, flags=re.DOTALL)[:1] or ["{}"]
    measured: dict[str, Any] = json.loads(html.unescape(title))
    return measured


def run(browser: str, page: Path, options: list[str], width: int) -> str:
    """Open a page in Chromium and return what Chromium prints."""
    command: list[str] = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command += ["--virtual-time-budget=4000", f"--window-size={max(width, 500)},4000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def find_faults(measured: dict[str, Any], width: int, *, dark: bool) -> list[str]:
    """Return descriptions of the faults of a page."""
    if not measured:
        return ["the page could not be measured"]
    faults = []
    if measured["width"] != width or measured["dark"] is not dark:
        faults.append("the page has the wrong width or color scheme")
    if measured["overflow"] > 0:
        faults.append(f"the content is {measured['overflow']} px wider than the page")
    if len(measured["charts"]) != 5:
        faults.append(f"{len(measured['charts'])} charts instead of 5")
    if any(left < 0 or right > width or height < 40 for left, right, height in measured["charts"]):
        faults.append("a chart is cut off or too flat")
    if measured["loaded"]:
        faults.append(f"the page loads {measured['loaded'][0]}")
    low_contrast = [pair for pair in measured["colors"] if contrast(pair) < MIN_CONTRAST]
    if low_contrast or not measured["colors"]:
        faults.append(f"text has too little contrast, or there is none: {low_contrast[:2]}")
    return faults


def contrast(pair: str) -> float:
    """Return the contrast of the two colors of `rgb(…) on rgb(…)`, from relative luminances as in WCAG 2.2."""
    luminances = []
    for color in pair.split(" on "):
        channels = [int(number) / 255 for number in re.findall(r"\d+", color)[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


if __name__ == "__main__":
    sys.exit(main())
