"""`freebits recover`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import add_calibration, add_device, add_model, add_out, add_sign, command, text_of
from freebits.cli.output import print_facts
from freebits.cli.progress import progress_bar


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "recover",
        "train to recover quality that slicing or quantizing lost (lossy)",
        "Trains the folder to predict what the original model predicts. Of a quantized folder it trains the scales "
        "and the norms; of a sliced, low-rank or plain one every linear layer, by LoRA, merged at the end (pip "
        "install 'freebits[recover]'). OUT has the same form and size; a sliced model packs a few percent larger. It "
        "takes minutes per 100 million parameters. Memory: both models in float32.",
    )
    add_model(parser, "folder of a sliced, low-rank, plain or quantized checkpoint")
    add_out(parser)
    parser.add_argument("--against", metavar="MODEL", type=Path, required=True, help="the original model")
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
        calibration=text_of(arguments.calibration),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        rank=arguments.rank,
        seed=arguments.seed,
        device=arguments.device,
        force=arguments.force,
        sign_with=arguments.sign,
        progress=progress_bar(),
    )
    return print_facts(facts, arguments.json)
