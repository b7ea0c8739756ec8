"""`freebits import`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import add_model, add_out, command
from freebits.cli.output import print_facts


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "import",
        "convert a model that SliceGPT's own code sliced",
        "The command reads the .pt file that TransformerCompression's run_slicegpt.py saved for Llama, OPT, Phi-2 or "
        "Phi-3, or a .safetensors file with the same tensor names. It reads only tensors, so no code in the file can "
        "run. OUT has the same weights, loads with from_pretrained after `import freebits`, and can be packed.",
    )
    parser.add_argument(
        "file",
        metavar="FILE.pt",
        type=Path,
        help="the saved file; if there is a .json file of the same name, its sizes are compared with those of MODEL",
    )
    add_model(parser, "folder of the dense model that was sliced")
    add_out(parser)
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.api.import_slicegpt import import_slicegpt

    return print_facts(import_slicegpt(arguments.file, arguments.model, arguments.out), arguments.json)
