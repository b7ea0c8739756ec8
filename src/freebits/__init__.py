"""Make LLM checkpoints smaller by the bits their symmetries waste.

Importing freebits teaches transformers' Auto classes to load sliced and packed checkpoints.
"""

from freebits.errors import CheckpointError, FreebitsError, UnsupportedModelError, UsageError
from freebits.evaluation import evaluate, verify
from freebits.huggingface import estimate, load, slice_model
from freebits.packed import inspect, pack, unpack
from freebits.version import __version__

__all__ = [
    "CheckpointError",
    "FreebitsError",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "estimate",
    "evaluate",
    "inspect",
    "load",
    "pack",
    "slice_model",
    "unpack",
    "verify",
]
