"""`freebits inspect`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import REMOTE, command
from freebits.cli.output import print_facts


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "inspect",
        "print what a folder contains and how large it is",
        "The command reads headers, not tensors.",
    )
    parser.add_argument("path", metavar="PATH", type=Path, help=f"folder of any checkpoint{REMOTE}")
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.evaluation.inspection import inspect

    return print_facts(inspect(arguments.path), arguments.json)
