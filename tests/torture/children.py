"""Runs of the command line in a process forked from one that has everything imported, and has not begun to compute."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TRACEBACK = 70
"""Exit code of a child that ended in an exception."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code, or minus the signal; what it said."""

    code: int
    said: str

    @property
    def in_one_line(self) -> bool:
        """Whether it did what it was to do, or said in a line why not."""
        said = [line for line in self.said.splitlines() if line.startswith("freebits: error")]
        return self.code in (0, 1) or (self.code == 2 and len(said) == 1 and "Traceback" not in self.said)


@dataclass
class Child:
    """A child at work."""

    pid: int
    log: Path

    def end(self) -> Ended:
        """Wait for it."""
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace"))

    def alive(self, seconds: float) -> bool:
        """Whether it is still at work after so many seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(0.002)
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)


def started(function: Callable[[], int], log: Path) -> Child:
    """A child that runs a function and exits with what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the child is at what it is made for
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return Child(pid, log)
    code = TRACEBACK
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        handle = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = function()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(argv: Sequence[str], log: Path, before: Callable[[], object] | None = None) -> Child:
    """A child that runs a command line."""

    def run() -> int:
        from freebits.cli.main import main

        if before:
            before()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        except KeyboardInterrupt:  # it came before anything of ours ran
            return 128 + signal.SIGINT
        return main(list(argv))

    return started(run, log)


def import_everything() -> None:
    """What the verbs import, so that children need not."""
    from transformers import LlamaForCausalLM  # noqa: F401

    import freebits.integrations.auto_classes  # noqa: F401
