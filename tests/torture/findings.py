"""What is counted, whatever is tried."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Finding:
    """What came of trying one thing so often.

    Attributes:
        part: of the torture.
        tried: what, for people.
        times: how often.
        refused: runs that ended in one line, or were killed as they were meant to be.
        harmless: runs whose result is what it should be.
        silent: runs with another result and no word of it.
        tracebacks: runs that ended in something else than one line.
        left: runs that left something behind, also after the next run.
        notes: figures for people, and what the first bad run said.
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
        """Runs that must not be."""
        return self.silent + self.tracebacks + self.left

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


HEADER = ("tried", "runs", "refused in one line", "harmless", "silent", "tracebacks", "leftovers", "notes")


def table(findings: Iterable[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---:|---:|---:|---:|---:|---:|---|"]
    for of in findings:
        numbers = (f"{of[key]:,}" for key in ("times", "refused", "harmless", "silent", "tracebacks", "left"))
        lines.append(f"| {of['tried']} | " + " | ".join(numbers) + f" | {'; '.join(of['notes'][:3])} |")
    return "\n".join(lines) + "\n"
