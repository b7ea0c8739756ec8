"""Child processes that run command lines.

They are forked from a process that has imported everything that commands need, and has computed nothing.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TRACEBACK = 70
"""Exit code of a child that an exception ended."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a child process.

    Attributes:
        exit_code: the exit code, or the negative number of the signal that ended the child.
        output: the text that the child printed to stdout and stderr.
    """

    exit_code: int
    output: str

    @property
    def clean(self) -> bool:
        """Whether the exit code is 0 or 1, or is 2 with exactly one error line and no traceback."""
        errors = [line for line in self.output.splitlines() if line.startswith("freebits: error")]
        return self.exit_code in (0, 1) or (self.exit_code == 2 and len(errors) == 1 and "Traceback" not in self.output)


@dataclass
class Child:
    """A running child process."""

    pid: int
    log: Path

    def wait(self) -> Outcome:
        """Wait until the child ends, and return the outcome."""
        _, status = os.waitpid(self.pid, 0)
        return Outcome(os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace"))

    def alive_after(self, seconds: float) -> bool:
        """Wait for `seconds`, or until the child ends. Return whether the child is still running."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(0.002)
        return True

    def send(self, signal_number: int) -> None:
        """Send a signal to the child."""
        os.kill(self.pid, signal_number)


def start_child(function: Callable[[], int], log: Path) -> Child:
    """Start a child process that calls a function and exits with the exit code that the function returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # in the child until `start_command` unblocks it
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return Child(pid, log)
    exit_code = TRACEBACK
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        handle = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        exit_code = function()
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def start_command(argv: Sequence[str], log: Path, before: Callable[[], object] | None = None) -> Child:
    """Start a child process that calls `before`, if given, and then runs a freebits command line."""

    def run() -> int:
        from freebits.cli.main import main

        if before:
            before()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        except KeyboardInterrupt:  # SIGINT arrived before `main` could handle it
            return 128 + signal.SIGINT
        return main(list(argv))

    return start_child(run, log)


def import_everything() -> None:
    """Import the modules that the commands import, so that children need not import them."""
    from transformers import LlamaForCausalLM  # noqa: F401

    import freebits.integrations.auto_classes  # noqa: F401
