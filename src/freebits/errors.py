"""Everything freebits raises on bad input.

    FreebitsError
    ├── UsageError             an argument that makes no sense
    ├── CheckpointError        a folder or file that is missing, broken or not what it should be
    └── UnsupportedModelError  a sound checkpoint of a model freebits has no symmetry for

Each message is one line: which file or tensor, what was found, what to do. The command line prints it
and exits with 2.
"""

from freebits.limits import MESSAGE


def one_line(text: object, longest: int = MESSAGE) -> str:
    """A text safe to print: control characters escaped, the middle of what is very long left out.

    Names of tensors and files come from checkpoints of strangers, and end up on terminals.
    """
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: 4 * longest])
    if len(printable) <= longest:
        return printable
    return f"{printable[: longest * 2 // 3]} … {printable[-longest // 3 :]}"


class FreebitsError(Exception):
    """Base class of all errors raised for bad input."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UsageError(FreebitsError):
    """An argument that makes no sense."""


class CheckpointError(FreebitsError):
    """A folder or file that is missing, broken or not what it should be."""


class UnsupportedModelError(FreebitsError):
    """A sound checkpoint of a model freebits has no symmetry for."""
