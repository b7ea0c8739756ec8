"""The exceptions that freebits raises on bad input.

    FreebitsError
    ├── UsageError             an argument is invalid
    ├── CheckpointError        a folder or file is missing, damaged or of the wrong type
    └── UnsupportedModelError  the checkpoint is sound, but freebits does not support its model

Each message is one line: which file or tensor, what was found, what to do. The command line prints it and exits with 2.
"""

from freebits.limits import MESSAGE


def one_line(text: object, max_length: int = MESSAGE) -> str:
    """Return a text that is safe to print: escape control characters and cut out the middle of a long text.

    Names of tensors and files come from untrusted checkpoints, and terminals print them.
    """
    start = str(text)[: 4 * max_length]
    printable = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in start)
    if len(printable) <= max_length:
        return printable
    return f"{printable[: max_length * 2 // 3]} … {printable[-max_length // 3 :]}"


def reason_of(error: BaseException, max_length: int = 200) -> str:
    """Return the message of another library's exception in one line, or its type if it has no message."""
    return one_line(" ".join(str(error).split()) or type(error).__name__, max_length)


class FreebitsError(Exception):
    """Base class of all errors raised for bad input."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UsageError(FreebitsError):
    """An argument is invalid."""


class CheckpointError(FreebitsError):
    """A folder or file is missing, damaged or of the wrong type."""


class UnsupportedModelError(FreebitsError):
    """The checkpoint is sound, but freebits does not support its model."""
