"""The logits of the model in a folder for a text, whatever its size."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from freebits.calibration.engine import opened_engine
from freebits.errors import UnsupportedModelError
from freebits.quantized_inputs.source import readable
from freebits.storage.folder import Source
from freebits.types import CPU

AT_ONCE = 8192
"""Tokens in a batch."""


def window_logits(path: Path, windows: Tensor, seen: Callable[[Source], Source] | None = None) -> Iterator[Tensor]:
    """The logits for the tokens after the first of each window, (T - 1, V), in float32.

    Args:
        path: folder of a dense, sliced or packed checkpoint.
        windows: (windows, T).
        seen: gives the model in another form.

    Raises:
        UnsupportedModelError: transformers cannot run it on a text alone.
    """
    source = readable(path)
    if source.config.get("quantization_config"):
        raise UnsupportedModelError(f"the weights in {path} are quantized by another tool: unpack it first")
    _, engine = opened_engine(source, path, CPU, *([seen] if seen else []))
    for batch in windows.split(max(1, AT_ONCE // windows.shape[1])):
        yield from engine.logits(batch)
