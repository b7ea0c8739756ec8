"""The command line: parse, call, print."""

import io
import os
import signal
import sys
from collections.abc import Sequence

import transformers

from freebits.cli.parser import BAD_INPUT, build_parser
from freebits.errors import FreebitsError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 a check did not hold, 2 bad input or usage."""
    for name in ("SIGTERM", "SIGHUP"):  # so that drafts are cleared away
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:  # not under nohup
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no delta
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = build_parser().parse_args(argv)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
    except FreebitsError as error:
        print(f"freebits: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:  # mostly of printing: what concerns a checkpoint has become a FreebitsError
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"freebits: error: {error}", file=sys.stderr)
        return BAD_INPUT
    return code
