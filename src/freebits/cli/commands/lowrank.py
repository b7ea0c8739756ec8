"""`freebits lowrank`."""

from argparse import ArgumentParser, Namespace
from typing import Any

from freebits.cli.arguments import (
    add_calibration,
    add_device,
    add_model,
    add_out,
    add_parallel,
    add_sign,
    calibration,
    command,
    parallel,
    size,
)
from freebits.cli.output import print_facts
from freebits.cli.progress import progress_bar
from freebits.options import ALLOCATIONS, SLOPE


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "lowrank",
        "replace linear layers by low-rank layers (reduced-order modeling, lossy, research)",
        "A layer becomes two smaller layers. Run freebits pack afterwards, which leaves out the redundant weights of "
        "the two layers. By default, OUT is about as large as MODEL until it is packed. A packed folder that is loaded "
        "with freebits.load(FOLDER, keep_pivots=True) also needs fewer multiplications. Layers are reduced one after "
        "another; each is calibrated on the outputs of the layers reduced before it (arXiv 2312.07046). The "
        "command prints the perplexity on windows of the calibration text that were not used for calibration. At equal "
        "size, freebits quantize loses less quality. Memory holds a few blocks in float32, and then all low-rank "
        "layers; it holds the whole model while the model generates text, or if the model takes at most 1 GiB in "
        "float32.",
    )
    add_model(parser, "folder of a plain or sliced checkpoint")
    add_out(parser)
    parser.add_argument(
        "--budget",
        metavar="FRACTION",
        type=float,
        help="fraction of the weights in the blocks' matrices to keep, counted after freebits pack (default: 0.8)",
    )
    parser.add_argument(
        "--target-size", metavar="BYTES", type=size, help="largest size of the weights in OUT; replaces --budget"
    )
    parser.add_argument(
        "--blocks", default="all", help="blocks to reduce: all, or last:N for the last N blocks (default: %(default)s)"
    )
    parser.add_argument(
        "--allocate",
        choices=ALLOCATIONS,
        default=SLOPE,
        help="slope: choose ranks so that one more weight would reduce the expected loss equally in every layer; "
        "uniform: keep the same fraction of each matrix; paper: reduce only the last blocks, as in arXiv 2312.07046, "
        "which needs --budget 0.9, 0.8 or 0.5 (default: %(default)s)",
    )
    add_calibration(parser, samples=64, seq_len=256)
    add_device(parser)
    add_sign(parser)
    add_parallel(parser)
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.api.lowrank import lowrank

    facts = lowrank(
        arguments.model,
        arguments.out,
        budget=arguments.budget,
        target_size=arguments.target_size,
        blocks=arguments.blocks,
        allocate=arguments.allocate,
        **calibration(arguments),
        parallel=parallel(arguments, jobs=1),
        resume=arguments.resume,
        sign_with=arguments.sign,
        progress=progress_bar(),
    )
    return print_facts(facts, arguments.json)
