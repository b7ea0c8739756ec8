"""`freebits unpack`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import add_jobs, add_out, add_packed, command
from freebits.cli.output import print_json
from freebits.cli.progress import progress_bar


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "unpack",
        "write the plain checkpoint that a packed folder encodes",
        "Use this for vLLM, llama.cpp's converter and other tools. OUT is about as large as the model was before it "
        "was packed or quantized. If the model was quantized, OUT has the rounded weights, not the original weights. A "
        "sliced model still needs `import freebits`. Memory holds about one block per job in float64, and one "
        "embedding.",
    )
    add_packed(parser)
    add_out(parser)
    parser.add_argument(
        "--base",
        metavar="BASE",
        type=Path,
        help="folder or hub id of the model's base, if PACKED was packed with --base and the base has moved since then",
    )
    add_jobs(parser)
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.api.pack import unpack
    from freebits.execution.executor import Parallel

    facts = unpack(
        arguments.packed,
        arguments.out,
        base=arguments.base,
        parallel=Parallel(jobs=arguments.jobs),
        progress=progress_bar(),
    )
    return print_json(facts) if arguments.json else 0
