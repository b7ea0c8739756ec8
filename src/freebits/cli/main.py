"""The entry point of the command line. It runs the command, and turns an error into one line and an exit code."""

import io
import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence

from freebits.cli.parser import BAD_INPUT, build_parser
from freebits.cli.progress import verbosity
from freebits.errors import FreebitsError, is_out_of_memory, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 after success, 1 if a check failed, 2 after bad input, 128 + n if signal n stopped the command.

    Raises:
        SystemExit: an argument is invalid (code 2), the user asked for help, or SIGTERM or SIGHUP (signal n) stopped
            the command (code 128 + n).
    """
    arguments = Namespace()
    # These signals raise SystemExit, so that `new_directory` can clean up. A signal that nohup ignores stays ignored.
    for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # some terminals cannot print Δ
    try:
        arguments = build_parser().parse_args(argv)
        with verbosity(quiet=arguments.quiet, verbose=arguments.verbose):
            exit_code = int(arguments.run(arguments))
        if sys.stdout is not None:  # None if the caller closed it
            sys.stdout.flush()
    except FreebitsError as error:
        return _print_error(error, arguments)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _print_error(
            FreebitsError(
                "out of memory: set `jobs` to 1 if the command has this option, or use a machine with more memory"
            ),
            arguments,
        )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return _close_stdout()
    except OSError as error:  # usually from printing: errors about checkpoints are FreebitsErrors
        if error.filename is not None:
            return _print_error(error, arguments)
        _close_stdout()
        return _print_error(error, arguments)
    return exit_code


def _print_error(error: Exception, arguments: Namespace) -> int:
    """Print an error in one line, and return the exit code. Names of parameters in backticks become flags."""
    values = vars(arguments)

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        if name in ("model", "out", "packed"):
            return name.upper()
        return f"--{name.replace('_', '-')}" if name in values or name == "jobs" else match[0]

    print(f"freebits: error: {one_line(re.sub('`([a-z_]+)`', flag, str(error)))}", file=sys.stderr)
    return BAD_INPUT


def _close_stdout() -> int:
    """Redirect stdout, which is broken, to the null device, so that Python can flush it. Return the exit code."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BAD_INPUT
