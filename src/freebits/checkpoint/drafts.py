"""What a draft is the beginning of, so that the same command can go on with it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from freebits.errors import CheckpointError
from freebits.version import __version__
from freebits.work import Desk, Team

UNFINISHED = "unfinished"
"""The folder of a draft in which finished pieces lie."""
_TASK = "task.json"


@dataclass(frozen=True)
class Task:
    """A command that can be stopped and gone on with.

    Attributes:
        verb: what is done.
        source: the folder from which.
        arguments: everything else that the result depends on.
        team: who does it.
        resume: whether to go on with what a stopped run left.
    """

    verb: str
    source: Path
    arguments: Mapping[str, Any]
    team: Team = field(default_factory=Team)
    resume: bool = True

    @property
    def facts(self) -> str:
        """What must agree before a run goes on with what another began: the command, the source, the software."""
        states = _states(self.source)
        versions = {"freebits": __version__, "torch": torch.__version__}
        told = {"verb": self.verb, "arguments": dict(self.arguments), "source": states, **versions}
        return json.dumps(told, indent=2, sort_keys=True, default=str)

    @property
    def name(self) -> str:
        """Of a draft that several processes share."""
        return sha256(self.facts.encode()).hexdigest()[:16]

    def began(self, draft: Path) -> bool:
        """Whether a draft is one of this task."""
        path = draft / UNFINISHED / _TASK
        return path.is_file() and path.read_text(encoding="utf-8") == self.facts

    def desk(self, draft: Path) -> Desk:
        """Where finished pieces lie in a draft."""
        desk = Desk(draft / UNFINISHED)
        if not self.began(draft):
            (draft / UNFINISHED / _TASK).write_text(self.facts, encoding="utf-8")
        return desk


@contextmanager
def unchanged(source: Path) -> Iterator[None]:
    """Several steps that read a folder, which together make sense only if it is the same for all of them.

    Raises:
        CheckpointError: it was changed meanwhile.
    """
    before = _states(source)
    yield
    try:
        after = _states(source)
    except FileNotFoundError:
        after = []
    if after != before:
        raise CheckpointError(f"{source} was changed while it was read: try again when nothing writes to it")


def _states(source: Path) -> list[tuple[str, int, int]]:
    """Of the files that make a model: name, size and time."""
    files = sorted(file for file in source.glob("*") if file.suffix in (".json", ".safetensors") and file.is_file())
    return [(file.name, (of := file.stat()).st_size, of.st_mtime_ns) for file in files]


def text_digest(text: str | None) -> str | None:
    """Of a text that is an argument."""
    return None if text is None else sha256(text.encode()).hexdigest()
