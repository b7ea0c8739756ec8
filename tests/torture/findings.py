"""Counts of the outcomes of the long tests."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Finding:
    """The counted outcomes of one kind of disturbance, which is one row of the table.

    Attributes:
        part: the part of the long tests, a key of `PARTS`.
        tried: a description of the disturbance, for people.
        times: the number of runs.
        refused: number of runs that ended with a one-line error, or were killed as intended.
        harmless: number of runs with the correct result.
        silent: number of runs with a wrong result and no message.
        tracebacks: number of runs that ended in any other way than with a result or a one-line error.
        left: number of runs after which unwanted files stayed behind, even after a rerun.
        notes: figures for people, and the output of bad runs.
    """

    part: str
    tried: str
    times: int = 0
    refused: int = 0
    harmless: int = 0
    silent: int = 0
    tracebacks: int = 0
    left: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        """The number of runs that count as failures."""
        return self.silent + self.tracebacks + self.left

    def as_json(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return asdict(self)


HEADER = ("tried", "runs", "refused in one line", "harmless", "silent", "tracebacks", "leftovers", "notes")


def table(findings: Iterable[Mapping[str, Any]]) -> str:
    """Return the findings as a table in Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---:|---:|---:|---:|---:|---:|---|"]
    for finding in findings:
        counts = (f"{finding[key]:,}" for key in ("times", "refused", "harmless", "silent", "tracebacks", "left"))
        lines.append(f"| {finding['tried']} | " + " | ".join(counts) + f" | {'; '.join(finding['notes'][:3])} |")
    return "\n".join(lines) + "\n"
