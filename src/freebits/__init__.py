"""Make LLM checkpoints smaller by the bits their symmetries waste.

Importing freebits teaches transformers' Auto classes to load sliced and packed checkpoints.
"""

import importlib
from typing import TYPE_CHECKING, Any

from freebits.errors import CheckpointError, FreebitsError, UnsupportedModelError, UsageError
from freebits.import_hook import register_with_transformers
from freebits.version import __version__

if TYPE_CHECKING:
    from freebits.compression import compress
    from freebits.evaluation import evaluate, verify, write_report
    from freebits.huggingface import (
        estimate,
        import_slicegpt,
        load,
        lowrank,
        quantize,
        recover,
        rotate_model,
        slice_model,
    )
    from freebits.report import inspect
    from freebits.verbs import pack, unpack
    from freebits.work import Parallel

__all__ = [
    "CheckpointError",
    "FreebitsError",
    "Parallel",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "compress",
    "estimate",
    "evaluate",
    "import_slicegpt",
    "inspect",
    "load",
    "lowrank",
    "pack",
    "quantize",
    "recover",
    "rotate_model",
    "slice_model",
    "unpack",
    "verify",
    "write_report",
]

_VERBS = {
    "Parallel": "work",
    "compress": "compression",
    "estimate": "huggingface",
    "evaluate": "evaluation",
    "import_slicegpt": "huggingface",
    "inspect": "report",
    "load": "huggingface",
    "lowrank": "huggingface",
    "pack": "verbs",
    "quantize": "huggingface",
    "recover": "huggingface",
    "rotate_model": "huggingface",
    "slice_model": "huggingface",
    "unpack": "verbs",
    "verify": "evaluation",
    "write_report": "evaluation",
}
"""Function → module that is imported when it is first asked for: PyTorch and transformers take seconds."""


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_VERBS[name]}"), name)


register_with_transformers()
