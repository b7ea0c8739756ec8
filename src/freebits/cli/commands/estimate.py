"""`freebits estimate`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import REMOTE, add_revision, add_sparsity, command
from freebits.cli.output import Row, changes, print_json, print_size_table, print_table


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "estimate",
        "print how large a model would become, before downloading it",
        "The command reads only the config. Without --sparsity, it prints the approximate sizes of the folders that "
        "freebits writes by default. With --sparsity, it prints the size of every form of the model, dense and sliced: "
        "the number of parameters (without norms, headers and corrections, as in arXiv 2410.01309), and the bytes of "
        "all tensors in the config's dtype. If the head is tied to the embedding, the forms `dense`, `dense canonical` "
        "and `canonical tied` contain the shared matrix once; the other forms have a separate matrix for the head. "
        "The last row is the approximate size after freebits slice and freebits pack with default options.",
    )
    parser.add_argument("config", metavar="MODEL", type=Path, help=f"a config.json, a folder that contains one{REMOTE}")
    add_sparsity(parser, required=False)
    add_revision(parser)
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.api.estimate import estimate

    result = estimate(arguments.config, arguments.sparsity, arguments.revision)
    if arguments.json:
        return print_json(result)
    if arguments.sparsity is None:
        return print_size_table(result)
    print(f"hidden size {result['hidden_size']:,}, sliced to {result['sliced_size']:,}; bytes in {result['dtype']}")
    rows: list[Row] = [("form", "params", "bytes", "vs dense", "vs dense untied")]
    for form, n_bytes in result["bytes"].items():
        if n_bytes is not None:
            count = result["params"].get(form)
            name = "as written by default, about" if form == "default" else form.replace("_", " ")
            rows.append(
                (name, "" if count is None else f"{count:,}", f"{n_bytes:,}", *changes(n_bytes, result["bytes"]))
            )
    return print_table(rows)
