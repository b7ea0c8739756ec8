"""`freebits verify`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import add_evaluation_text, add_packed, command, text_of
from freebits.cli.output import print_json
from freebits.cli.progress import progress_bar


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "verify",
        "check a packed folder, and compare it with the original model if --against is given",
        "The command checks every digest. With --against, it also compares PACKED with MODEL. If PACKED was made with "
        "--codec none, the tensors must be equal. Otherwise the command runs both models on the CPU in float32, block "
        "by block. Logits must be finite; the mean KL divergence and the ratio of perplexities must be within "
        "tolerances, which are tight after pack and loose after quantize and slice. The exit code is 1 if a check "
        "fails, and 2 if the folder is damaged.",
    )
    add_packed(parser)
    parser.add_argument(
        "--against",
        metavar="MODEL",
        type=Path,
        help="folder of the model from which PACKED was made, or of an earlier model in its history",
    )
    parser.add_argument(
        "--kl", type=float, help="largest mean KL divergence in nats per token (default: 0.01, or 1 after lossy steps)"
    )
    parser.add_argument(
        "--ratio", type=float, help="largest ratio of perplexities (default: 1.01, or 1.5 after lossy steps)"
    )
    parser.add_argument(
        "--key",
        metavar="PUBLIC",
        type=Path,
        help="first check that the owner of this public key (PEM file) signed all files",
    )
    add_evaluation_text(parser, 8, "windows")
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.evaluation.verification import verify

    result = verify(
        arguments.packed,
        against=arguments.against,
        text=text_of(arguments.text),
        seq_len=arguments.seq_len,
        limit=arguments.limit,
        kl=arguments.kl,
        ratio=arguments.ratio,
        key=arguments.key,
        progress=progress_bar(),
    )
    exit_code = 0 if result["ok"] else 1
    if arguments.json:
        print_json(result)
        return exit_code
    signed = f"signed by the owner of {arguments.key}; " if arguments.key else ""
    print(f"{signed}every digest matches, everything decodes")
    if result["perplexity"]["packed"] is not None:
        perplexity = result["perplexity"]
        print(f"perplexity        {perplexity['packed']:.4f} packed, {perplexity['reference']:.4f} reference")
        print(f"perplexity ratio  {result['ratio']:.5f}")
        print(f"mean KL           {result['mean_kl']:.2e} nats per token")
        print(f"max |Δlogit|      {result['max_abs_logit_diff']:.3g}")
    if arguments.against:
        failed = ", ".join(result["failed"])
        print(f"{f'NOT within tolerance ({failed})' if failed else 'within tolerance'} for {result['fidelity']} steps")
    return exit_code
