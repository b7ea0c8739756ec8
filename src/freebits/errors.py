"""The exceptions that freebits raises on bad input.

    FreebitsError
    ├── UsageError             an argument is invalid
    ├── CheckpointError        a folder or file is missing, damaged or of the wrong type
    └── UnsupportedModelError  the checkpoint is sound, but freebits does not support its model

Each message is one line. It says which argument, file or tensor is concerned, what was found and, if freebits knows it,
what to do. The command line prints the message and exits with code 2.
"""

from freebits.limits import MESSAGE

_NO_MEMORY = ("DefaultCPUAllocator", "CUDA out of memory", "bad_alloc", "can't start new thread")
"""Parts of the error messages of PyTorch, C++ and Python when memory runs out."""


def one_line(text: object, max_length: int = MESSAGE) -> str:
    """Return a text that is safe to print in one line: control characters are escaped, and a long text is shortened.

    Messages contain names of tensors and files from untrusted checkpoints. Control characters in such a name could
    manipulate a terminal.

    Args:
        text: the text, or an object that `str` converts. Only the first `4 * max_length` characters are used.
        max_length: number of characters above which ` … ` replaces the middle of the text. The result has at most
            `max_length + 3` characters.
    """
    start = str(text)[: 4 * max_length]
    printable = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in start)
    if len(printable) <= max_length:
        return printable
    return f"{printable[: max_length * 2 // 3]} … {printable[-max_length // 3 :]}"


def reason_of(error: BaseException, max_length: int = 200) -> str:
    """Return another library's error message in one line, or the name of the exception type if there is no message."""
    return one_line(" ".join(str(error).split()) or type(error).__name__, max_length)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out. Such an error says nothing about the model."""
    return isinstance(error, MemoryError) or any(message in str(error) for message in _NO_MEMORY)


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
