"""`freebits completion`."""

from argparse import ArgumentParser, Namespace
from typing import Any

from freebits.cli.arguments import command
from freebits.errors import UsageError


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "completion",
        "print a completion script for a shell",
        "For bash, run freebits completion bash > ~/.local/share/bash-completion/completions/freebits. For zsh, write "
        "the script to a file named _freebits in a folder of fpath. The command needs "
        "pip install 'freebits[completion]'.",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.cli.parser import build_parser

    try:
        import shtab
    except ImportError:
        raise UsageError("completion needs the package shtab: run pip install 'freebits[completion]'") from None
    print(shtab.complete(build_parser(), arguments.shell))
    return 0
