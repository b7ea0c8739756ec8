"""Save and print tables of results, with the machine they were measured on."""

import csv
import logging
import os
import platform
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Return the processor, the number of cores and the versions of packages in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    packages = ", ".join(f"{name} {version(name)}" for name in ("freebits", "torch", "transformers"))
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}"


def save_csv(name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as CSV; the first line is a comment that names the machine."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {machine()}\n")
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def saved_rows(name: str) -> list[tuple[str, ...]]:
    """Return the rows of a saved table; empty if there is no such table."""
    path = RESULTS / f"{name}.csv"
    return [tuple(row) for row in csv.reader(path.read_text().splitlines()[2:])] if path.exists() else []


def write_page(path: Path, title: str, about: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table as a page of the documentation."""
    cells = (" | ".join(cell.replace("|", "/") for cell in row) for row in rows)
    lines = [f"# {title}", "", about, "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    path.write_text("\n".join([*lines, *(f"| {row} |" for row in cells)]) + "\n", encoding="utf-8")


def many_small_models() -> None:
    """Configure a run over many small models: one thread, and no messages from transformers."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
