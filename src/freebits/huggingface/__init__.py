"""The only place that imports transformers: sliced and packed models, running a dense one block by block, loading.

Importing it registers the models with transformers' Auto classes.
"""

from freebits.huggingface import low_rank_models, packed_models, sliced_models
from freebits.huggingface.config_estimate import estimate
from freebits.huggingface.import_slicegpt import import_slicegpt
from freebits.huggingface.loading import load
from freebits.huggingface.low_rank_checkpoint import lowrank
from freebits.huggingface.packed_models import auto_class, reads_text
from freebits.huggingface.quantize_checkpoint import WINDOW, prepare, quantize
from freebits.huggingface.recover_checkpoint import recover
from freebits.huggingface.rotate_checkpoint import rotate_model
from freebits.huggingface.rounding import FALLBACK_BITS, Goal
from freebits.huggingface.slice_checkpoint import slice_model
from freebits.huggingface.streamed import window_logits
from freebits.huggingface.tokens import token_windows

__all__ = [
    "FALLBACK_BITS",
    "WINDOW",
    "Goal",
    "auto_class",
    "estimate",
    "import_slicegpt",
    "load",
    "low_rank_models",
    "lowrank",
    "packed_models",
    "prepare",
    "quantize",
    "reads_text",
    "recover",
    "rotate_model",
    "slice_model",
    "sliced_models",
    "token_windows",
    "window_logits",
]
