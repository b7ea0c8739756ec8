"""Where results go, and on what machine they were made."""

import csv
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor, cores and versions, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    packages = ", ".join(f"{name} {version(name)}" for name in ("freebits", "torch", "transformers"))
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}"


def save_csv(name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table of numbers, the machine in its first line as a comment."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {machine()}\n")
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |")
