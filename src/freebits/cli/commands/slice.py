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
    command,
    parallel,
    text_of,
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
        "Calibrates block by block on a text and reports the perplexity on other windows of that text. It supports "
        "the families in docs/families.md (Llama, Qwen, Mistral, Phi, OPT and others). The sliced model needs fewer "
        "multiplications, but at equal bytes quantize loses less. Memory: one block, one embedding and the "
        "calibration's activations. Then run freebits pack.",
    )
    add_model(parser, "folder of a plain checkpoint")
    add_out(parser)
    add_sparsity(parser, required=True)
    parser.add_argument("--untie", action="store_true", help="give a tied head its own matrix, as SliceGPT does")
    add_calibration(parser, samples=64, seq_len=512)
    parser.add_argument("--random-orientation", action="store_true", help="rotate each kept subspace at random")
    add_device(parser, "calibrate")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the sliced weights (default: that of each tensor)")
    parser.add_argument(
        "--force", action="store_true", help="keep a result even if its perplexity is over 5 times the model's"
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
        calibration=text_of(arguments.calibration),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        random_orientation=arguments.random_orientation,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        force=arguments.force,
        parallel=parallel(arguments, jobs=1),
        resume=arguments.resume,
        progress=progress_bar(),
    )
    return print_facts(facts, arguments.json)
