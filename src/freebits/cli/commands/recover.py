"""`freebits recover`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import add_calibration, add_device, add_model, add_out, add_sign, calibration, command
from freebits.cli.output import print_facts
from freebits.cli.progress import progress_bar


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "recover",
        "train to recover quality that slicing or quantizing lost (lossy)",
        "The command trains the model to predict what the original model predicts. In a quantized folder, it trains "
        "norms, biases and the scales of rows. In a sliced, low-rank or plain folder, it trains every linear layer "
        "except the head by LoRA, which is merged at the end (this needs pip install 'freebits[recover]'). OUT has the "
        "format and size of MODEL; if a sliced model is packed afterwards, it is a few percent larger than without "
        "training. Training takes minutes per 100 million parameters. Memory holds both models in float32.",
    )
    add_model(parser, "folder of a sliced, low-rank, plain or quantized checkpoint")
    add_out(parser)
    parser.add_argument("--against", metavar="MODEL", type=Path, required=True, help="folder of the original model")
    add_calibration(parser, samples=128, seq_len=256)
    parser.add_argument("--rank", type=int, default=16, help="rank of LoRA (default: %(default)s)")
    add_device(parser, "train")
    parser.add_argument("--force", action="store_true", help="keep the result even if training did not help")
    add_sign(parser)
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.api.recover import recover

    facts = recover(
        arguments.model,
        arguments.out,
        against=arguments.against,
        **calibration(arguments),
        rank=arguments.rank,
        force=arguments.force,
        sign_with=arguments.sign,
        progress=progress_bar(),
    )
    return print_facts(facts, arguments.json)
