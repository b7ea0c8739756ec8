"""The only place that imports transformers: sliced and packed models, running a dense one block by block, loading.

Importing it registers the models with transformers' Auto classes.
"""

from freebits.huggingface import factory, sliced
from freebits.huggingface.estimating import estimate
from freebits.huggingface.loading import load
from freebits.huggingface.slicer import slice_model
from freebits.huggingface.tokens import token_windows

__all__ = ["estimate", "factory", "load", "slice_model", "sliced", "token_windows"]
