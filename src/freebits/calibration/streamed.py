"""Compute the logits of a model for a text, with little memory even for a large model."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from freebits.calibration.engine import open_engine
from freebits.dequantization.source import open_as_floats
from freebits.errors import UnsupportedModelError
from freebits.storage.checkpoint import Source
from freebits.types import CPU

_BATCH_TOKENS = 8192


def window_logits(path: Path, windows: Tensor, convert: Callable[[Source], Source] | None = None) -> Iterator[Tensor]:
    """For each window, yield the logits for the tokens after the first token, (T - 1, V), float32.

    Args:
        path: folder of a dense, sliced or packed checkpoint.
        windows: (windows, T).
        convert: function that returns a source with the same tensors in another form; None changes nothing.

    Raises:
        UnsupportedModelError: transformers cannot run the model on text only, or the folder is a packed copy of a model
            that another tool has quantized.
    """
    source = open_as_floats(path)
    if source.config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{path} is a packed copy of a model that another tool has quantized: unpack it first"
        )
    _, engine = open_engine(source, path, CPU, *([convert] if convert else []))
    for batch in windows.split(max(1, _BATCH_TOKENS // windows.shape[1])):
        yield from engine.logits(batch)
