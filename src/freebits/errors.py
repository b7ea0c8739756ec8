"""Everything freebits raises on bad input.

    FreebitsError
    ├── UsageError             an argument that cannot be
    ├── CheckpointError        a folder or file that is missing, broken or not what it should be
    └── UnsupportedModelError  a sound checkpoint of a model freebits has no symmetry for

Each message is one line: which file or tensor, what was found, what to do. The command line prints it
and exits with 2.
"""


class FreebitsError(Exception):
    """Base class of all errors raised for bad input."""


class UsageError(FreebitsError):
    """An argument that cannot be."""


class CheckpointError(FreebitsError):
    """A folder or file that is missing, broken or not what it should be."""


class UnsupportedModelError(FreebitsError):
    """A sound checkpoint of a model freebits has no symmetry for."""
