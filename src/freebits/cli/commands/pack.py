"""`freebits pack`."""

from argparse import ArgumentParser, Namespace
from typing import Any

from freebits.cli.arguments import add_device, add_jobs, add_model, add_out, add_parallel, add_sign, command, parallel
from freebits.cli.output import print_facts
from freebits.cli.progress import progress_bar
from freebits.options import CANONICAL, CODECS, ENTROPIES


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "pack",
        "pack a checkpoint: function-preserving, or bit-exact with --codec none",
        "A sliced model can be rotated at each block without changing its output, and in any model the basis inside "
        "an attention head is free. Packing chooses these rotations so that fewer bits have to be stored, and "
        "entropy-codes the rest. Memory: two blocks per job and one embedding.",
    )
    add_model(parser, "folder of a sliced or plain checkpoint, or of a LoRA adapter; with --codec none any folder")
    add_out(parser)
    parser.add_argument(
        "--codec",
        choices=CODECS,
        default=CANONICAL,
        help="canonical: a standard rotation, the smallest; bits-back: the code of arXiv 2410.01309; none: any model, "
        "every byte is kept, bfloat16 shrinks to about 70 %% (default: %(default)s)",
    )
    parser.add_argument(
        "--entropy", choices=ENTROPIES, default="auto", help="bit-exact final stage (default: %(default)s)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="bits-back: largest error of a decoded value that is not corrected (default: 0.01; the paper: 0.005)",
    )
    add_device(parser, "run linear algebra")
    add_jobs(parser)
    add_sign(parser)
    add_parallel(parser)
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.api.pack import pack

    facts = pack(
        arguments.model,
        arguments.out,
        codec=arguments.codec,
        entropy=arguments.entropy,
        threshold=arguments.threshold,
        device=arguments.device,
        parallel=parallel(arguments),
        resume=arguments.resume,
        sign_with=arguments.sign,
        progress=progress_bar(),
    )
    return print_facts(facts, arguments.json)
