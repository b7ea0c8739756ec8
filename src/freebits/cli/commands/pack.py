"""`freebits pack`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import REMOTE, add_device, add_jobs, add_out, add_parallel, add_sign, command, parallel
from freebits.cli.output import print_facts, print_series
from freebits.cli.progress import progress_bar
from freebits.options import CANONICAL, CODECS, ENTROPIES


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "pack",
        "pack a checkpoint (function-preserving, or bit-exact with --codec none or --base)",
        "A sliced model can be rotated at each block without changing its output. In any model, the basis inside an "
        "attention head can be changed without changing the output. The command chooses rotations and bases so that "
        "fewer bits have to be stored, and entropy-codes the stored tensors. Memory holds two blocks per job in "
        "float64, and one embedding.",
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        type=Path,
        help="folder of a sliced or plain checkpoint or of a LoRA adapter (of any model with --codec none)"
        f"{REMOTE}; if there are several, OUT gets a packed folder for each",
    )
    add_out(parser)
    parser.add_argument(
        "--codec",
        choices=CODECS,
        default=CANONICAL,
        help="canonical: choose rotations and bases that make weights redundant, and leave out these weights, which "
        "gives the smallest folder; bits-back: the code of arXiv 2410.01309; none: only entropy coding, for any model; "
        "unpack then restores the files byte for byte (default: %(default)s)",
    )
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="folder or hub id of the model from which MODEL was trained. Only the differences from BASE are stored, "
        "bit for bit, and loading needs BASE. If there are several MODELs, 'first' (the default) or 'previous' means "
        "one of them. 'none' makes a folder that needs no base, also from a packed MODEL that needs one",
    )
    parser.add_argument(
        "--entropy",
        choices=ENTROPIES,
        default="auto",
        help="auto: entropy-code the tensors that become smaller, without loss; none: entropy-code no tensor "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="bits-back: correct each value whose decoded error would be larger than this (default: 0.01; arXiv "
        "2410.01309 uses 0.005 for Llama 2)",
    )
    add_device(parser, "run linear algebra")
    add_jobs(parser)
    add_sign(parser)
    add_parallel(parser)
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.api.pack import FIRST, pack, pack_series

    options: dict[str, Any] = {
        "codec": arguments.codec,
        "entropy": arguments.entropy,
        "threshold": arguments.threshold,
        "device": arguments.device,
        "parallel": parallel(arguments),
        "resume": arguments.resume,
        "sign_with": arguments.sign,
        "progress": progress_bar(),
    }
    if len(arguments.models) == 1:
        facts = pack(arguments.models[0], arguments.out, base=arguments.base, **options)
    else:
        facts = pack_series(arguments.models, arguments.out, base=arguments.base or FIRST, **options)
        return print_series(facts, arguments.json)
    return print_facts(facts, arguments.json)
