"""Self-generated calibration data: what a model writes is what quantizing must not change, whatever its domain."""

import inspect
import math
import os
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from freebits.errors import CheckpointError, UnsupportedModelError, UsageError, one_line
from freebits.execution.machine import physical_memory
from freebits.execution.progress import Progress, silent
from freebits.integrations.loading import load
from freebits.quantized_inputs.source import readable
from freebits.types import HALVES

_TIMES = 7
_SLOWER = 1.3
"""By how much 16-bit floats must be slower for float32 to be chosen: a choice that noise does not change."""


def self_generated_windows(
    path: str | os.PathLike[str],
    samples: int,
    seq_len: int,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
) -> Tensor:
    """Tokens drawn from the model's own predictions at temperature 1, after the token that begins a text.

    The whole model is in memory for that: in its own dtype, or in float32 where that is faster and there is room.

    Args:
        path: folder of the model.
        samples: texts to write, side by side.
        seq_len: tokens of each.
        seed: of the draw.
        device: where to run.
        progress: called after each token.

    Returns:
        (samples, seq_len), int64.

    Raises:
        UsageError: the model has no token to begin with, or an argument makes no sense.
    """
    return write_windows(
        load(path, dtype=_fast_dtype(path, device)).to(device).eval(), samples, seq_len, seed, progress
    )


def _fast_dtype(path: str | os.PathLike[str], device: torch.device) -> torch.dtype | str:
    """Float32 where products of 16-bit floats are slower and a third of the machine's memory holds the model."""
    specs = readable(path).specs.values()
    halves = {spec.dtype for spec in specs if spec.code in HALVES}
    wide = sum(4 * spec.numel for spec in specs)
    if device.type != "cpu" or not halves or 3 * wide > physical_memory():
        return "auto"
    half = max(halves, key=str)
    return torch.float32 if _seconds(half) > _SLOWER * _seconds(torch.float32) else "auto"


def _seconds(dtype: torch.dtype) -> float:
    """That a product as in writing takes, at best."""
    x, W = torch.ones(32, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = math.inf
    for _ in range(_TIMES):
        start = time.perf_counter()
        linear(x, W)
        best = min(best, time.perf_counter() - start)
    return best


@torch.no_grad()
def write_windows(model: Any, samples: int, seq_len: int, seed: int, progress: Progress = silent) -> Tensor:
    """The same of a model that is in memory."""
    if samples < 1 or seq_len < 2 or not 0 <= seed < 2**63:
        raise UsageError(f"samples {samples}, windows of {seq_len} tokens, seed {seed}: give 1, 2 and 0 at least")
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < seq_len:
        raise UsageError(f"texts of {seq_len} tokens, where the model has {positions} positions: lower --seq-len")
    configs = (model.config, model.config.get_text_config(decoder=True), model.generation_config)
    named = (getattr(config, key, None) for config in configs for key in ("bos_token_id", "eos_token_id"))
    first = next((token for token in named if token is not None), None)
    first = first[0] if isinstance(first, list) else first
    n_ids = model.get_input_embeddings().weight.shape[0]
    if not isinstance(first, int) or not 0 <= first < n_ids:
        raise UsageError(
            f"{model.name_or_path} names no token that begins a text (bos_token_id or eos_token_id is {first}, the "
            f"vocabulary has {n_ids}): give a text with --calibration"
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = torch.full((samples, 1), first, device=model.device)
    cache: dict[str, Any] | None = {cache_name(model): None}
    for done in range(1, seq_len):
        logits, cache = _predicted(model, tokens, cache)
        tokens = torch.cat([tokens, drawn(logits.float().softmax(-1), generator)], dim=1)
        progress("writing calibration text", "token", done, seq_len - 1)
    return tokens.cpu()


def _predicted(model: Any, tokens: Tensor, cache: dict[str, Any] | None) -> tuple[Tensor, dict[str, Any] | None]:
    """The logits after the last token, (n, vocabulary), and the cache; without a cache where the model has none.

    Raises:
        UnsupportedModelError: transformers cannot run the model on a text alone.
    """
    if cache is not None:
        with suppress(Exception):  # some models have a cache of another kind; the library's kinds of error are many
            output = model(input_ids=tokens[:, -1:], use_cache=True, **cache)
            cache = {name: getattr(output, name) for name in cache}
            if None not in cache.values():
                return output.logits[:, -1], cache
    try:
        return model(input_ids=tokens, use_cache=False).logits[:, -1], None
    except Exception as error:
        finding = one_line(" ".join(str(error).split()) or type(error).__name__, 200)
        raise UnsupportedModelError(
            f"transformers cannot write a text with this model ({finding}): give one with --calibration"
        ) from error


def drawn(chances: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of chances, (n, 1).

    Raises:
        CheckpointError: a chance is no number.
    """
    if not chances.isfinite().all():
        raise CheckpointError("the model's predictions are not finite: its weights overflow, or are damaged")
    sums = chances.cumsum(-1, dtype=torch.float64)  # much faster than torch.multinomial
    uniform = torch.rand(*chances.shape[:-1], 1, dtype=torch.float64, device=chances.device, generator=generator)
    return torch.searchsorted(sums, uniform * sums[..., -1:]).clamp_max(chances.shape[-1] - 1)


def cache_name(model: Any) -> str:
    """What `forward` calls it: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
