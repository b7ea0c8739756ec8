"""Arguments that several commands share, and functions that read their values."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freebits.errors import CheckpointError
from freebits.options import BACKENDS, THREADS, TRELLIS

if TYPE_CHECKING:
    from freebits.execution.executor import Parallel

REMOTE = ", an address (s3://…), or an id on the hub"


def command(commands: Any, name: str, summary: str, description: str) -> ArgumentParser:
    """Add the parser of one command.

    Args:
        commands: result of `add_subparsers`.
        name: name of the command.
        summary: line that `freebits --help` prints about the command, without a period.
        description: text that `freebits NAME --help` prints after the summary.
    """
    parser: ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {description}"
    )
    return parser


def add_verbosity(parser: ArgumentParser) -> None:
    """Add the options that determine what a command prints."""
    group = parser.add_argument_group("output").add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    group.add_argument("--quiet", action="store_true", help="print errors only")
    group.add_argument("--verbose", action="store_true", help="print log lines with times instead of a progress bar")


def add_model(parser: ArgumentParser, what: str) -> None:
    """Add the argument for the input folder, which can also be an address or an id on the hub.

    Args:
        parser: parser of the command.
        what: kinds of folders that the command accepts, for its help.
    """
    parser.add_argument("model", metavar="MODEL", type=Path, help=f"{what}{REMOTE}")


def add_packed(parser: ArgumentParser) -> None:
    """Add the argument for the packed input folder."""
    parser.add_argument(
        "packed", metavar="PACKED", type=Path, help="folder that compress, quantize, pack or recover wrote"
    )


def add_out(parser: ArgumentParser) -> None:
    """Add the argument for the output folder."""
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create, or an address; it must not exist yet")


def add_revision(parser: ArgumentParser) -> None:
    """Add the option for a revision on the hub."""
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub (default: main)")


def add_device(parser: ArgumentParser, what: str = "run the model") -> None:
    """Add the option for a device of PyTorch."""
    parser.add_argument("--device", default="cpu", help=f"device on which to {what} (default: %(default)s)")


def add_sparsity(parser: ArgumentParser, *, required: bool) -> None:
    """Add the option for the fraction of the hidden size to remove."""
    parser.add_argument(
        "--sparsity", type=float, required=required, help="fraction of the hidden size to remove, in [0, 1)"
    )


def add_calibration(parser: ArgumentParser, samples: int, seq_len: int) -> None:
    """Add the options for the calibration text."""
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="file with calibration text (default: text that the model generates)",
    )
    parser.add_argument("--samples", type=int, default=samples, help="number of windows of text (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=seq_len, help="tokens per window (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def add_base(parser: ArgumentParser) -> None:
    """Add the option for the base of a model."""
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="folder or hub id of the model from which MODEL was trained; OUT stores only the differences, and loading "
        "OUT needs BASE",
    )


def add_uncalibrated(parser: ArgumentParser) -> None:
    """Add the options for matrices that are rounded without calibration or not at all."""
    parser.add_argument(
        "--fallback-bits",
        metavar="BITS",
        type=float,
        default=6.0,
        help="average bits per weight of matrices that are rounded without calibration, such as those of a vision "
        "tower (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        metavar="PATTERN",
        action="append",
        default=[],
        help="do not quantize tensors whose names match this pattern, such as 'vision_tower.*'; can be repeated",
    )


def add_trellis(parser: ArgumentParser) -> None:
    """Add the option for trellis-coded quantization."""
    parser.add_argument(
        "--trellis",
        metavar="STATES",
        type=int,
        default=TRELLIS,
        help="number of states of trellis-coded quantization: 4, 8, 16, …, 256, or 0 to round each weight separately; "
        "more states give better quality at the same size, but take more time (default: %(default)s)",
    )


def add_evaluation_text(parser: ArgumentParser, limit: int | None, what: str) -> None:
    """Add the options for the text on which a model is measured."""
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="file with text to measure on (default: pages of Python's documentation)",
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=limit, help=f"use at most this many {what} (default: {limit or 'all'})"
    )


def add_sign(parser: ArgumentParser) -> None:
    """Add the option for a private key."""
    parser.add_argument(
        "--sign",
        metavar="KEY",
        type=Path,
        help="sign OUT with this private key (PEM file); verify --key checks the signature",
    )


def add_jobs(parser: ArgumentParser) -> None:
    """Add the option for the number of pieces of work that run at the same time."""
    parser.add_argument(
        "--jobs",
        type=int,
        help="number of matrices or blocks to process at once (default: at most 4, fewer if they are large)",
    )


def add_parallel(parser: ArgumentParser) -> None:
    """Add the options of a command that can be resumed and can run on several machines."""
    group = parser.add_argument_group("large models", "rerun an interrupted command to resume it")
    group.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="discard the work of an interrupted run, and start again",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default=THREADS,
        help="where to run the work: threads of this process, or ray (needs pip install 'freebits[ray]') "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--address", help="HOST:PORT of a Ray cluster (default: a cluster that runs on this machine, else a new one)"
    )


def size(text: str) -> int:
    """Read a number of bytes, which can have a decimal unit, such as `66000000`, `66MB` or `1.2GB`.

    Raises:
        ValueError: the text is not a size.
    """
    number = text.upper().removesuffix("B")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    value = float(number.rstrip("KMG")) * unit
    if not 0 < value < 2**62:
        raise ValueError(text)
    return round(value)


def calibration(arguments: Namespace) -> dict[str, Any]:
    """Return the values of `add_calibration` and `add_device`, as keyword arguments of the Python functions."""
    names = ("samples", "seq_len", "seed", "device")
    return {"calibration": text_of(arguments.calibration), **{name: getattr(arguments, name) for name in names}}


def parallel(arguments: Namespace, jobs: int | None = None) -> "Parallel":
    """Return the parallel options of a command."""
    from freebits.execution.executor import Parallel

    return Parallel(jobs=jobs or arguments.jobs, backend=arguments.backend, address=arguments.address)


def text_of(path: Path | None) -> str | None:
    """Return the text in a file, or None if no file was given.

    Raises:
        CheckpointError: the file cannot be read as UTF-8 text.
    """
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}): give a plain text file") from None
