"""Text that a model writes itself: what it has to say is what quantising must not change, whatever its domain."""

import inspect
import os
from typing import Any

import torch
from torch import Tensor

from freebits.errors import CheckpointError, UsageError
from freebits.huggingface.loading import load
from freebits.work import Progress, silent


def own_windows(
    path: str | os.PathLike[str],
    samples: int,
    seq_len: int,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
) -> Tensor:
    """Tokens drawn from the model's own predictions at temperature 1, after the token that begins a text.

    The whole model is in memory for that, in its own dtype.

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
    return write_windows(load(path).to(device).eval(), samples, seq_len, seed, progress)


@torch.no_grad()
def write_windows(model: Any, samples: int, seq_len: int, seed: int, progress: Progress = silent) -> Tensor:
    """The same of a model that is in memory."""
    if samples < 1 or seq_len < 2 or not 0 <= seed < 2**63:
        raise UsageError(f"samples {samples}, windows of {seq_len} tokens, seed {seed}: give 1, 2 and 0 at least")
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and seq_len > positions:
        raise UsageError(f"texts of {seq_len} tokens, where the model has {positions} positions: lower --seq-len")
    first = model.config.bos_token_id
    first = model.config.eos_token_id if first is None else first
    first = first[0] if isinstance(first, list) else first
    if first is None:
        raise UsageError(f"{model.name_or_path} has no token that begins a text: give a text with --calibration")
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = torch.full((samples, 1), first, device=model.device)
    cache: dict[str, Any] = {cache_name(model): None}
    for done in range(1, seq_len):
        output = model(input_ids=tokens[:, -1:], use_cache=True, **cache)
        cache = {name: getattr(output, name) for name in cache}
        chances = output.logits[:, -1].float().softmax(-1)
        tokens = torch.cat([tokens, drawn(chances, generator)], dim=1)
        progress(done, seq_len - 1)
    return tokens.cpu()


def drawn(chances: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of chances, (n, 1).

    Raises:
        CheckpointError: a chance is no number.
    """
    if not chances.isfinite().all():
        raise CheckpointError("the model's predictions are not finite: its weights overflow, or are damaged")
    return torch.multinomial(chances, 1, generator=generator)


def cache_name(model: Any) -> str:
    """What `forward` calls it: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
