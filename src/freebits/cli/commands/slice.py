"""`freebits slice`."""

from argparse import ArgumentParser, Namespace
from typing import Any

from freebits.cli.arguments import (
    add_calibration,
    add_device,
    add_model,
    add_out,
    add_parallel,
    add_sparsity,
    calibration,
    command,
    parallel,
)
from freebits.cli.output import print_facts
from freebits.cli.progress import progress_bar
from freebits.options import DTYPES


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "slice",
        "reduce the hidden size (SliceGPT, lossy)",
        "The command calibrates block by block on a text, and prints the perplexity on windows of the text that were "
        "not used for calibration. It supports the families in docs/families.md (Llama, Qwen, Mistral, Phi, OPT and "
        "others). The sliced model needs fewer multiplications, but at equal size, freebits quantize loses less "
        "quality. Memory holds about two blocks, one embedding and the residual stream of the text; it holds the whole "
        "model while the model generates text, or if the model takes at most 1 GiB in float32. Run freebits pack "
        "afterwards.",
    )
    add_model(parser, "folder of a plain checkpoint")
    add_out(parser)
    add_sparsity(parser, required=True)
    parser.add_argument("--untie", action="store_true", help="give a tied head its own matrix, as SliceGPT does")
    add_calibration(parser, samples=64, seq_len=512)
    parser.add_argument(
        "--random-orientation", action="store_true", help="rotate the axes of each kept subspace at random"
    )
    add_device(parser, "calibrate")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the sliced weights (default: each tensor keeps its dtype)"
    )
    parser.add_argument(
        "--force", action="store_true", help="keep the result even if its perplexity is more than 5 times that of MODEL"
    )
    add_parallel(parser)
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    import torch

    from freebits.api.slice import slice_model

    facts = slice_model(
        arguments.model,
        arguments.out,
        sparsity=arguments.sparsity,
        untie=arguments.untie,
        **calibration(arguments),
        random_orientation=arguments.random_orientation,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        force=arguments.force,
        parallel=parallel(arguments, jobs=1),
        resume=arguments.resume,
        progress=progress_bar(),
    )
    return print_facts(facts, arguments.json)
