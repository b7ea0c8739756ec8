"""`freebits report`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import add_evaluation_text, add_model, command, text_of
from freebits.cli.output import print_json
from freebits.cli.progress import progress_bar


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "report",
        "write an HTML page about a folder: sizes, quality, history",
        "The page is one file that contains its charts and needs no network. With --against, the command runs both "
        "models block by block; for comparison, it also runs the original model rounded to 8 and to 4 bits. The "
        "command needs pip install 'freebits[report]'.",
    )
    add_model(parser, "folder of a checkpoint, packed or not")
    parser.add_argument(
        "-o",
        "--output",
        metavar="PAGE",
        type=Path,
        default=Path("report.html"),
        help="page to write; an existing file is replaced (default: %(default)s)",
    )
    parser.add_argument("--against", metavar="MODEL", type=Path, help="folder of the original model")
    add_evaluation_text(parser, 8, "windows")
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.evaluation.reporting import write_report

    result = write_report(
        arguments.model,
        arguments.output,
        against=arguments.against,
        text=text_of(arguments.text),
        seq_len=arguments.seq_len,
        limit=arguments.limit,
        progress=progress_bar(),
    )
    if arguments.json:
        return print_json(result)
    print(f"{result['page']}: open it in a browser")
    return 0
