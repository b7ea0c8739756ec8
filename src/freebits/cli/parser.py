"""The parser of the command line, assembled from the commands."""

import argparse
from typing import NoReturn

from freebits.cli.arguments import add_verbosity
from freebits.cli.commands import (
    completion,
    compress,
    estimate,
    evaluate,
    import_slicegpt,
    inspect,
    lowrank,
    pack,
    quantize,
    recover,
    report,
    rotate,
    slice,  # noqa: A004
    unpack,
    verify,
)
from freebits.errors import one_line
from freebits.version import __version__

BAD_INPUT = 2
COMMANDS = (
    *(compress, estimate, quantize, pack, unpack, inspect, verify, report, evaluate),
    *(slice, import_slicegpt, lowrank, recover, rotate, completion),
)
"""The modules of all commands, in the order of `freebits --help`."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"freebits: error: {one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. The namespace that it returns has the chosen command's function as `run`."""
    root = _Parser(
        prog="freebits",
        description="Make LLM checkpoints smaller: quantize or slice them (lossy), or pack them (lossless or "
        "function-preserving).",
        epilog="Run freebits estimate MODEL first, then freebits compress MODEL OUT. MODEL is a folder, an id on the "
        "hub or an address (s3://, gs://, https://, hf://). OUT is a folder or an address that can be written. The "
        "result loads with from_pretrained after `import freebits`. For other tools (vLLM, llama.cpp's converter), run "
        "freebits unpack first. Files and downloads become smaller. In memory, a quantized model is by default as "
        "large and as fast as the original; a sliced model is smaller.",
    )
    root.set_defaults(quiet=False, verbose=False)
    root.add_argument("--version", action="version", version=f"freebits {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        parser = module.add(commands)
        parser.set_defaults(run=module.run)
        if module is not completion:
            add_verbosity(parser)
    return root
