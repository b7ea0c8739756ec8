"""Generate calibration text with the model itself.

Such text is a sample of the model's own predictions, which quantization should preserve.
"""

import inspect
import os
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from freebits.dequantization.source import open_as_floats
from freebits.errors import CheckpointError, UnsupportedModelError, UsageError, is_out_of_memory, reason_of
from freebits.execution.machine import is_slow, physical_memory
from freebits.execution.progress import Progress, silent
from freebits.integrations.loading import load
from freebits.types import HALF_DTYPES


def self_generated_windows(
    path: str | os.PathLike[str],
    samples: int,
    seq_len: int,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
) -> Tensor:
    """Sample texts from a model's own predictions at temperature 1, starting with the token that begins a text.

    The function loads the whole model. It uses float32 if that is faster on this CPU and takes at most a third of the
    machine's memory, and otherwise the dtype of the checkpoint.

    Args:
        path: folder of the model.
        samples: number of texts, which are generated as one batch.
        seq_len: number of tokens per text.
        seed: seed for sampling the tokens.
        device: device on which to run the model.
        progress: callback after each token.

    Returns:
        (samples, seq_len), int64.

    Raises:
        UsageError: the config of the model defines no token that begins a text, or an argument is out of range.
        CheckpointError: the model cannot be loaded, or a prediction is not finite.
        UnsupportedModelError: transformers cannot run the model on text only.
    """
    return generate_windows(
        load(path, dtype=_fast_dtype(path, device)).to(device).eval(), samples, seq_len, seed, progress
    )


def _fast_dtype(path: str | os.PathLike[str], device: torch.device) -> torch.dtype | str:
    """Return float32 if the device is a CPU on which the model's 16-bit floats are slower than float32, else "auto".

    Even on such a CPU, return "auto" if the model in float32 takes more than a third of the machine's memory.
    """
    specs = open_as_floats(path).specs.values()
    halves = {spec.dtype for spec in specs if spec.dtype_name in HALF_DTYPES}
    float32_bytes = sum(4 * spec.numel for spec in specs)
    if device.type != "cpu" or not halves or 3 * float32_bytes > physical_memory():
        return "auto"
    return torch.float32 if is_slow(max(halves, key=str)) else "auto"


@torch.no_grad()
def generate_windows(model: Any, samples: int, seq_len: int, seed: int, progress: Progress = silent) -> Tensor:
    """Generate windows as `self_generated_windows` does, with a model that is already in memory."""
    if samples < 1 or seq_len < 2 or not 0 <= seed < 2**63:
        raise UsageError(
            f"`samples` is {samples}, `seq_len` is {seq_len} and `seed` is {seed}: give at least 1 for `samples`, at "
            "least 2 for `seq_len`, and 0 to 2^63 - 1 for `seed`"
        )
    n_positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(n_positions, int) and 0 < n_positions < seq_len:
        raise UsageError(f"`seq_len` is {seq_len}: give at most {n_positions}, the number of positions of the model")
    configs = (model.config, model.config.get_text_config(decoder=True), model.generation_config)
    candidates = (getattr(config, key, None) for config in configs for key in ("bos_token_id", "eos_token_id"))
    start_token = next((token for token in candidates if token is not None), None)
    start_token = start_token[0] if isinstance(start_token, list) else start_token
    n_ids = model.get_input_embeddings().weight.shape[0]
    if not isinstance(start_token, int) or not 0 <= start_token < n_ids:
        raise UsageError(
            f"the config of {model.name_or_path} defines no token that begins a text (bos_token_id or eos_token_id is "
            f"{start_token}, and the vocabulary has {n_ids} tokens): give a text as `calibration`"
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = torch.full((samples, 1), start_token, device=model.device)
    cache: dict[str, Any] | None = {cache_parameter(model): None}
    for done in range(1, seq_len):
        logits, cache = _next_logits(model, tokens, cache)
        tokens = torch.cat([tokens, sample_tokens(logits.float().softmax(-1), generator)], dim=1)
        progress("writing calibration text", "token", done, seq_len - 1)
    return tokens.cpu()


def _next_logits(model: Any, tokens: Tensor, cache: dict[str, Any] | None) -> tuple[Tensor, dict[str, Any] | None]:
    """Return the logits after the last token of each text, (n, vocabulary), and the new cache.

    The cache is None if the model returns no usable cache. From then on, each call runs all tokens through the model.

    Raises:
        UnsupportedModelError: transformers cannot run the model on text only.
    """
    if cache is not None:
        with suppress(Exception):  # models with another type of cache raise exceptions of many classes
            output = model(input_ids=tokens[:, -1:], use_cache=True, **cache)
            cache = {name: getattr(output, name) for name in cache}
            if None not in cache.values():
                return output.logits[:, -1], cache
    try:
        return model(input_ids=tokens, use_cache=False).logits[:, -1], None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = reason_of(error)
        raise UnsupportedModelError(
            f"transformers cannot generate text with this model ({reason}): give a text as `calibration`"
        ) from error


def sample_tokens(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Sample one token from each row of probabilities, and return the tokens, (n, 1).

    Raises:
        CheckpointError: a probability is not finite.
    """
    if not probabilities.isfinite().all():
        raise CheckpointError(
            "the model's predictions are not finite, because its weights are damaged or its values overflow: download "
            "the model again, or give a text as `calibration`, on which the model runs in float32"
        )
    sums = probabilities.cumsum(-1, dtype=torch.float64)  # much faster than torch.multinomial
    shape = (*probabilities.shape[:-1], 1)
    uniform = torch.rand(*shape, dtype=torch.float64, device=probabilities.device, generator=generator)
    return torch.searchsorted(sums, uniform * sums[..., -1:]).clamp_max(probabilities.shape[-1] - 1)


def cache_parameter(model: Any) -> str:
    """Return the name of the cache's parameter in the model's `forward`: `past_key_values` before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
