"""Make LLM checkpoints smaller: lossless packing, quantization, slicing and low-rank layers.

Importing freebits lets the Auto classes of transformers load packed, sliced and low-rank checkpoints.
"""

import importlib
from typing import TYPE_CHECKING, Any

from freebits.errors import CheckpointError, FreebitsError, UnsupportedModelError, UsageError
from freebits.integrations.import_hook import register_with_transformers
from freebits.version import __version__

if TYPE_CHECKING:
    from freebits.api.compress import compress
    from freebits.api.estimate import estimate
    from freebits.api.import_slicegpt import import_slicegpt
    from freebits.api.lowrank import lowrank
    from freebits.api.pack import pack, pack_series, unpack
    from freebits.api.quantize import quantize
    from freebits.api.recover import recover
    from freebits.api.rotate import rotate_model
    from freebits.api.slice import slice_model
    from freebits.evaluation.inspection import inspect
    from freebits.evaluation.perplexity import evaluate
    from freebits.evaluation.reporting import write_report
    from freebits.evaluation.verification import verify
    from freebits.execution.executor import Parallel
    from freebits.integrations.loading import load

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
    "pack_series",
    "quantize",
    "recover",
    "rotate_model",
    "slice_model",
    "unpack",
    "verify",
    "write_report",
]

_MODULES = {
    "Parallel": "execution.executor",
    "compress": "api.compress",
    "estimate": "api.estimate",
    "evaluate": "evaluation.perplexity",
    "import_slicegpt": "api.import_slicegpt",
    "inspect": "evaluation.inspection",
    "load": "integrations.loading",
    "lowrank": "api.lowrank",
    "pack": "api.pack",
    "pack_series": "api.pack",
    "quantize": "api.quantize",
    "recover": "api.recover",
    "rotate_model": "api.rotate",
    "slice_model": "api.slice",
    "unpack": "api.pack",
    "verify": "evaluation.verification",
    "write_report": "evaluation.reporting",
}
"""Public name → module. A module is imported on first use, because importing PyTorch and transformers takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


register_with_transformers()
