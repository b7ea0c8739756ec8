"""`freebits quantize`."""

from argparse import ArgumentParser, Namespace
from typing import Any

from freebits.cli.arguments import (
    add_calibration,
    add_device,
    add_jobs,
    add_model,
    add_out,
    add_parallel,
    add_sign,
    add_uncalibrated,
    command,
    parallel,
    size,
    text_of,
)
from freebits.cli.output import print_facts
from freebits.cli.progress import progress_bar
from freebits.options import INTEGERS, METHODS, PARTS, ROTATIONS


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "quantize",
        "quantize a checkpoint (lossy)",
        "Rounds every matrix to integers, at scales chosen so that each bit reduces the expected loss equally, and "
        "entropy-codes them. Calibrated on text that the model generates, unless a text is given. Runs the model "
        "block by block. Matrices that no text reaches are rounded without calibration, and so is a model that "
        "transformers cannot run on a text. Memory: one block and the embedding; the whole model while it generates "
        "text. Measurements are stored in the staging directory of OUT. Check the result with freebits verify OUT "
        "--against MODEL.",
    )
    add_model(parser, "folder of a plain, sliced or canonical checkpoint")
    add_out(parser)
    parser.add_argument("--bits", type=float, help="bits per weight on average, side data included (default: 4)")
    parser.add_argument("--target-size", metavar="BYTES", type=size, help="largest size of OUT: 66000000, 66MB, 1.2GB")
    parser.add_argument(
        "--target-kl",
        metavar="NATS",
        type=float,
        help="expected mean KL divergence in nats per token: 0.01 is hardly noticeable, 0.05 is 5 %% of perplexity",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=INTEGERS,
        help="integers are better; pyramid vectors are research (default: %(default)s)",
    )
    parser.add_argument(
        "--rotate", choices=ROTATIONS, default="none", help="round in a rotated basis; helps pyramid only"
    )
    parser.add_argument("--only", choices=PARTS, help="quantize only the blocks' matrices, or only embedding and head")
    add_uncalibrated(parser)
    add_calibration(parser, samples=32, seq_len=256)
    add_device(parser)
    add_jobs(parser)
    add_sign(parser)
    add_parallel(parser)
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.api.quantize import quantize

    facts = quantize(
        arguments.model,
        arguments.out,
        bits=arguments.bits,
        target_size=arguments.target_size,
        target_kl=arguments.target_kl,
        method=arguments.method,
        rotate=arguments.rotate,
        only=arguments.only,
        keep=arguments.keep,
        fallback_bits=arguments.fallback_bits,
        calibration=text_of(arguments.calibration),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        device=arguments.device,
        parallel=parallel(arguments),
        resume=arguments.resume,
        sign_with=arguments.sign,
        progress=progress_bar(),
    )
    return print_facts(facts, arguments.json)
