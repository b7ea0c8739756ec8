"""Resume stopped commands. A staging directory records the command that created it.

A piece is a part of a command's work whose result is stored as soon as it is finished (see `work_store`).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from freebits.errors import CheckpointError
from freebits.execution.work_store import WorkStore
from freebits.version import __version__

UNFINISHED = ".unfinished"
"""The folder in a staging directory that contains the finished pieces of an unfinished command."""
_TASK = "task.json"


@dataclass(frozen=True)
class Task:
    """A command that can be stopped and resumed.

    Attributes:
        command: the name of the command.
        source: the folder that the command reads.
        arguments: the arguments that the result depends on, except the source.
        resume: whether to use the pieces that a stopped run finished.
    """

    command: str
    source: Path
    arguments: Mapping[str, Any]
    resume: bool = True

    @property
    def facts(self) -> str:
        """Command, arguments, source and software versions as JSON. A run resumes only a run with equal facts."""
        states = file_states(self.source)
        versions = {"freebits": __version__, "torch": torch.__version__}
        facts = {"command": self.command, "arguments": dict(self.arguments), "source": states, **versions}
        return json.dumps(facts, indent=2, sort_keys=True, default=str)

    def began(self, staging: Path) -> bool:
        """Return whether a staging directory comes from a run of this task."""
        path = staging / UNFINISHED / _TASK
        return path.is_file() and path.read_text(encoding="utf-8") == self.facts

    def store(self, staging: Path) -> WorkStore:
        """Return the store of finished pieces in a staging directory, and record this task in the directory."""
        store = WorkStore(staging / UNFINISHED)
        if not self.began(staging):
            (staging / UNFINISHED / _TASK).write_text(self.facts, encoding="utf-8")
        return store


@contextmanager
def unchanged(source: Path) -> Iterator[None]:
    """Check that the files of a model do not change while the block runs.

    Raises:
        CheckpointError: a file was changed, added or removed.
    """
    before = file_states(source)
    yield
    try:
        after = file_states(source)
    except FileNotFoundError:
        after = []
    if after != before:
        raise CheckpointError(
            f"{source} was changed while it was read: rerun the command when nothing writes to the folder"
        )


def file_states(source: Path) -> list[tuple[str, int, int]]:
    """Return name, size and modification time (ns) of the JSON and weight files of a model, without subfolders."""
    files = sorted(
        file for file in source.glob("*") if file.suffix in (".json", ".safetensors", ".gguf") and file.is_file()
    )
    return [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def text_digest(text: str | None) -> str | None:
    """Return the SHA-256 digest of a text argument; None if there is no text."""
    return None if text is None else sha256(text.encode()).hexdigest()
