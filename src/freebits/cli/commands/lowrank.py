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
    command,
    parallel,
    size,
    text_of,
)
from freebits.cli.output import print_facts
from freebits.cli.progress import progress_bar
from freebits.options import ALLOCATIONS, SLOPE


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "lowrank",
        "replace linear layers by low-rank factors (reduced-order modelling, lossy, research)",
        "Each layer becomes two smaller ones, which take fewer bytes and fewer multiplications. Layers are reduced "
        "one after another, each on the outputs of those already reduced (arXiv 2312.07046). Reports the perplexity "
        "on other windows of the text. At equal bytes quantize loses less. Memory: one block and the embedding. Then "
        "run freebits pack.",
    )
    add_model(parser, "folder of a plain or sliced checkpoint")
    add_out(parser)
    parser.add_argument(
        "--budget",
        metavar="FRACTION",
        type=float,
        help="fraction of the blocks' weights to keep (default: 0.8)",
    )
    parser.add_argument("--target-size", metavar="BYTES", type=size, help="instead: largest size of OUT's weights")
    parser.add_argument("--blocks", default="all", help="which blocks to reduce: all, or last:N (default: %(default)s)")
    parser.add_argument(
        "--allocate",
        choices=ALLOCATIONS,
        default=SLOPE,
        help="slope: choose ranks so that the next direction is worth the same everywhere; uniform: the same "
        "fraction of each matrix; paper: only the last blocks, for a budget of 0.9, 0.8 or 0.5 (default: %(default)s)",
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
        calibration=text_of(arguments.calibration),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        device=arguments.device,
        parallel=parallel(arguments, jobs=1),
        resume=arguments.resume,
        sign_with=arguments.sign,
        progress=progress_bar(),
    )
    return print_facts(facts, arguments.json)
