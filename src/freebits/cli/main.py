"""The command line: parse, call, print. PyTorch and transformers are imported when a verb needs them."""

import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from freebits.cli.parser import BAD_INPUT, build_parser
from freebits.errors import FreebitsError, one_line

_NO_MEMORY = ("DefaultCPUAllocator", "CUDA out of memory", "bad_alloc", "can't start new thread")
"""What PyTorch, C++ and Python say when there is none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 a check did not hold, 2 bad input or usage."""
    for name in ("SIGTERM", "SIGHUP"):  # so that staging directories are removed
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:  # not under nohup
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no delta
    try:
        arguments = build_parser().parse_args(argv)
        commands, output = (importlib.import_module(f"freebits.cli.{name}") for name in ("commands", "output"))
        with output.speaking(quiet=arguments.quiet, verbose=arguments.verbose):
            code = int(getattr(commands, arguments.run)(arguments))
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except FreebitsError as error:
        return _refuse(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in _NO_MEMORY):
            raise
        return _refuse(FreebitsError("out of memory: where there is --jobs, less is held at once with --jobs 1"))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return _without_reader()
    except OSError as error:  # mostly of printing: what concerns a checkpoint has become a FreebitsError
        return _refuse(error) if error.filename is not None else _without_reader(error)
    return code


def _refuse(error: Exception) -> int:
    print(f"freebits: error: {one_line(error)}", file=sys.stderr)
    return BAD_INPUT


def _without_reader(error: Exception | None = None) -> int:
    """What we print has nowhere to go; nor has what Python would still flush at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BAD_INPUT if error is None else _refuse(error)
