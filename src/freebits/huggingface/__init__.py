"""The only place that imports transformers: sliced models, running a dense one block by block, loading.

Importing it registers the sliced models with transformers' Auto classes.
"""

from freebits.huggingface.estimate import estimate
from freebits.huggingface.loading import load
from freebits.huggingface.slicing import slice_model
from freebits.huggingface.tokens import token_windows

__all__ = ["estimate", "load", "slice_model", "token_windows"]
