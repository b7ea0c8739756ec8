"""The page of `freebits report` in a browser, wide and as on a phone, light and dark: `make browser`.

    python -m tests.browser [FOLDER]

Needs Chromium; FOLDER is where screenshots go, if one is given.
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
"""Name → what Chromium calls it."""
LEAST_CONTRAST = 4.5
"""Of text and its background: WCAG 2.2, level AA."""
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
    colours: [...new Set(texts.map(e => view.getComputedStyle(e).color + ' on ' + opaque(e)))],
    loaded: view.performance.getEntriesByType('resource').map(entry => entry.name)});
};
"""


def main() -> int:
    """Write a page, open it in every way, say what was found; the exit code says whether all was well."""
    browser = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if browser is None:
        print("there is no Chromium here")  # noqa: T201
        return 2
    faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        page = written(Path(scratch))
        for width in WIDTHS:
            for scheme, number in SCHEMES.items():
                options = [f"--blink-settings=preferredColorScheme={number}", f"--user-data-dir={scratch}/profile"]
                found = open_folder(browser, page, width, options)
                wrong = [*faulty(found, width, dark=scheme == "dark")]
                faults += len(wrong)
                print(f"{width} px, {scheme}: {'; '.join(wrong) or 'well'}")  # noqa: T201
                if len(sys.argv) > 1:
                    shot = Path(sys.argv[1]).absolute() / f"{scheme}-{width}.png"
                    run(browser, page.with_name("frame.html"), [*options, f"--screenshot={shot}"], width)
    return int(bool(faults))


def written(scratch: Path) -> Path:
    """The page of a small model, quantized."""
    tiny_model().half().save_pretrained(scratch / "dense")
    tiny_tokenizer().save_pretrained(scratch / "dense")
    text: dict[str, Any] = {"samples": 4, "seq_len": 32}
    freebits.quantize(scratch / "dense", scratch / "small", bits=5, calibration=random_text(600), **text)
    page = scratch / "page.html"
    freebits.write_report(
        scratch / "small", page, against=scratch / "dense", text=random_text(200), seq_len=32, limit=2
    )
    return page


def open_folder(browser: str, page: Path, width: int, options: list[str]) -> dict[str, Any]:
    """What a page looks like in a frame of so many pixels, with nothing to load from."""
    inside = html.escape(page.read_text(encoding="utf-8"))
    frame = page.with_name("frame.html")
    frame.write_text(
        f"<!doctype html><body style='margin: 0'><iframe style='border: 0; width: {width}px; height: 4000px' "
        f'srcdoc="{inside}"></iframe><script>{MEASURE}</script>',
        encoding="utf-8",
    )
    content = run(browser, frame, [*options, "--dump-dom"], width)
    [title] = re.findall(r"<title>(\{.*?\})</title>", content, flags=re.DOTALL)[:1] or ["{}"]
    found: dict[str, Any] = json.loads(html.unescape(title))
    return found


def run(browser: str, page: Path, options: list[str], width: int) -> str:
    """What Chromium prints of a page."""
    command: list[str] = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command += ["--virtual-time-budget=4000", f"--window-size={max(width, 500)},4000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def faulty(found: dict[str, Any], width: int, *, dark: bool) -> list[str]:
    """What is wrong with it."""
    if not found:
        return ["it could not be measured"]
    wrong = []
    if found["width"] != width or found["dark"] is not dark:
        wrong.append("it was not shown as it was to be")
    if found["overflow"] > 0:
        wrong.append(f"{found['overflow']} px beyond its right edge")
    if len(found["charts"]) != 5:
        wrong.append(f"{len(found['charts'])} charts, not 5")
    if any(left < 0 or right > width or height < 40 for left, right, height in found["charts"]):
        wrong.append("a chart that is not all to be seen")
    if found["loaded"]:
        wrong.append(f"it loads {found['loaded'][0]}")
    pale = [pair for pair in found["colours"] if contrast(pair) < LEAST_CONTRAST]
    if pale or not found["colours"]:
        wrong.append(f"text that is hard to read: {pale[:2]}")
    return wrong


def contrast(pair: str) -> float:
    """Of `rgb(…) on rgb(…)`: WCAG 2.2, relative luminance."""
    luminances = []
    for colour in pair.split(" on "):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


if __name__ == "__main__":
    sys.exit(main())
