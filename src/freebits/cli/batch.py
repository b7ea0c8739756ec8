"""A list of commands, each run by a process of its own."""

import argparse
import contextlib
import io
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from freebits.checkpoint import exists
from freebits.cli.parser import build_parser
from freebits.errors import CheckpointError, UsageError
from freebits.work import Team

_TRIES = 3
"""So often a command is run again that something killed, memory for instance."""


@dataclass(frozen=True)
class Ran:
    """What became of a line: `done`, `there` if its output was there already, or `failed`; and what it said last."""

    line: str
    result: str
    seconds: float
    said: str


def run_list(file: Path, team: Team) -> list[Ran]:
    """Run every line that is this process's.

    Raises:
        CheckpointError: the file cannot be read.
        UsageError: a line is no command; then none is run.
    """
    lines = _lines(file)
    if team.shared:
        lines, team = lines[team.rank :: team.world], Team(team.jobs)
    threads = max(1, torch.get_num_threads() // (team.jobs or 1))
    with team.crew(None) as crew:
        return list(crew.share("line", _Runner(threads), lines))


def _lines(file: Path) -> list[str]:
    """The lines that are commands, each checked."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as UTF-8 text ({error}): give a list of commands") from None
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = _words(line, f"{file}, line {number}")
        if words:
            found.append(shlex.join(words))
    return found


def _words(line: str, where: str) -> list[str]:
    """The words of a command that can be run; none of an empty line."""
    told = io.StringIO()
    try:
        words = shlex.split(line, comments=True)
        if words:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
                arguments = build_parser().parse_args(words)
            if arguments.run == "run_batch":
                raise UsageError(f"{where}: a list of lists")
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    except SystemExit:
        said = told.getvalue().strip().removeprefix("freebits: error: ").partition("\n")[0]
        raise UsageError(f"{where}: {said}") from None
    return words


@dataclass(frozen=True)
class _Runner:
    """Runs a line, with so many threads."""

    threads: int

    def __call__(self, line: str) -> Ran:
        arguments: argparse.Namespace = build_parser().parse_args(shlex.split(line))
        if getattr(arguments, "out", None) and exists(arguments.out):
            return Ran(line, "there", 0.0, "")
        start = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        command = [sys.executable, "-m", "freebits.cli", *shlex.split(line)]
        for _ in range(_TRIES):
            done = subprocess.run(  # noqa: S603  (what a person listed)
                command, capture_output=True, text=True, check=False, env=environment
            )
            if done.returncode >= 0:
                break
        said = (done.stderr if done.returncode else done.stdout).strip().rpartition("\n")[2]
        said = f"killed by signal {-done.returncode}" if done.returncode < 0 else said
        return Ran(line, "failed" if done.returncode else "done", time.perf_counter() - start, said)
