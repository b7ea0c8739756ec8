"""`freebits quantize`."""

from argparse import ArgumentParser, Namespace
from typing import Any

from freebits.cli.arguments import (
    add_base,
    add_calibration,
    add_device,
    add_jobs,
    add_model,
    add_out,
    add_parallel,
    add_sign,
    add_trellis,
    add_uncalibrated,
    calibration,
    command,
    parallel,
    size,
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
        "The command rounds matrices to integers times scales, and entropy-codes the integers. It chooses the scales "
        "so that one more bit would reduce the expected loss equally, whichever matrix gets it. It calibrates on text "
        "that the model generates or on a given text, and runs the model block by block. Matrices that the model does "
        "not use for text are rounded without calibration; so are all matrices of a model that transformers cannot run "
        "on text. Vectors, small routers and some other tensors stay unchanged. If they have more than 2 % of the "
        "weights, the command lists them with the reasons. Memory holds about three blocks in float32, and the "
        "activations and Gram matrices of a block. It holds the whole model while the model generates text, or if the "
        "model takes at most 1 GiB in float32. Until OUT is complete, measurements are stored in a hidden folder next "
        "to OUT. Check the result with freebits verify OUT --against MODEL.",
    )
    add_model(parser, "folder of a plain or sliced checkpoint, or of one that was packed with --codec canonical")
    add_out(parser)
    parser.add_argument(
        "--bits",
        type=float,
        help="average bits per weight, including those of scales (default: 4, if no other target is given)",
    )
    parser.add_argument("--target-size", metavar="BYTES", type=size, help="largest size of OUT, such as 66MB or 1.2GB")
    parser.add_argument(
        "--target-kl",
        metavar="NATS",
        type=float,
        help="expected mean KL divergence in nats per token; 0.01 is hardly noticeable, 0.05 raises perplexity by "
        "about 5 %%",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=INTEGERS,
        help="integers: better quality; pyramid: pyramid vector quantization, for research (default: %(default)s)",
    )
    add_trellis(parser)
    parser.add_argument(
        "--rotate",
        choices=ROTATIONS,
        default="none",
        help="basis in which to round; hadamard, a rotated basis, helps only --method pyramid (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        choices=PARTS,
        help="linear: quantize only the matrices of the blocks; embeddings: only the embedding and the head",
    )
    add_base(parser)
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
        trellis=arguments.trellis,
        rotate=arguments.rotate,
        only=arguments.only,
        keep=arguments.keep,
        base=arguments.base,
        fallback_bits=arguments.fallback_bits,
        **calibration(arguments),
        parallel=parallel(arguments),
        resume=arguments.resume,
        sign_with=arguments.sign,
        progress=progress_bar(),
    )
    return print_facts(facts, arguments.json)
