"""`freebits rotate`."""

from argparse import ArgumentParser, Namespace
from typing import Any

from freebits.cli.arguments import add_model, add_out, command
from freebits.cli.output import print_facts
from freebits.cli.progress import progress_bar


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "rotate",
        "rotate a checkpoint for other quantizers (QuaRot; function-preserving, research)",
        "The command folds the norms, and applies randomized Hadamard matrices to the residual stream and to the "
        "values of each head. This removes outliers of the weights and of the residual stream, which make quantization "
        "inaccurate. Use the command before GPTQ, AWQ or bitsandbytes; freebits quantize does not need it. OUT is a "
        "plain checkpoint. A tied head becomes a separate matrix.",
    )
    add_model(parser, "folder of a plain checkpoint")
    add_out(parser)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.api.rotate import rotate_model

    facts = rotate_model(arguments.model, arguments.out, seed=arguments.seed, progress=progress_bar())
    return print_facts(facts, arguments.json)
