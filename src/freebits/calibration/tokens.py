"""Text to windows of tokens."""

import os
from pydoc_data.topics import topics

import torch
from torch import Tensor

from freebits.errors import CheckpointError, UsageError
from freebits.integrations.loading import load_tokenizer
from freebits.integrations.packed_models import auto_for_text
from freebits.packed.reader import opened
from freebits.storage.folder import is_adapter
from freebits.storage.hub import located

_HELD_OUT_EVERY = 4


def embedded_text() -> tuple[str, str]:
    """Calibration text and held-out text, with no paragraph in common.

    Every fourth topic is held out. Some topics quote others whole, so paragraphs that a held-out topic
    contains are taken out of the calibration text.
    """
    names = sorted(topics)
    held_out = [topics[name] for name in names[::_HELD_OUT_EVERY]]
    quoted = {paragraph for text in held_out for paragraph in text.split("\n\n")}
    rest = (topics[name] for index, name in enumerate(names) if index % _HELD_OUT_EVERY)
    calibration = ("\n\n".join(p for p in text.split("\n\n") if p not in quoted) for text in rest)
    return "\n\n".join(calibration), "\n\n".join(held_out)


def token_windows(path: str | os.PathLike[str], text: str, seq_len: int, limit: int | None = None) -> Tensor:
    """A text cut into windows that do not overlap, (windows, seq_len), int64; a shorter rest is dropped.

    Args:
        path: folder with the tokenizer.
        text: what to tokenize, as one document.
        seq_len: tokens a window.
        limit: take the first so many windows only.

    Raises:
        UsageError: `seq_len` is less than two or more than the model has positions for, `limit` less than one, or the
            text does not fill one window.
        CheckpointError: see `load_tokenizer`; or the tokenizer is another model's.
        UnsupportedModelError: see `auto_for_text`.
    """
    if seq_len < 2:
        raise UsageError(f"a window of {seq_len} tokens predicts nothing: give --seq-len of at least 2")
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} windows measure nothing: give --limit of at least 1")
    path = located(path)
    config = opened(path).config
    if not is_adapter(config):
        auto_for_text(config)
    tokenizer = load_tokenizer(path)
    n_positions, n_ids = config.get("max_position_embeddings"), config.get("vocab_size")
    if isinstance(n_positions, int) and seq_len > n_positions:
        raise UsageError(f"a window of {seq_len} tokens, where the model has {n_positions} positions: lower --seq-len")
    tokens = tokenizer(text, verbose=False)["input_ids"]
    n_windows = len(tokens) // seq_len
    if not n_windows:
        raise UsageError(f"the text has {len(tokens)} tokens, less than one window of {seq_len}: lower --seq-len")
    if isinstance(n_ids, int) and max(tokens) >= n_ids:
        raise CheckpointError(f"{path}: the tokenizer's token {max(tokens)} is not in a vocab_size of {n_ids}")
    return torch.tensor(tokens[: n_windows * seq_len]).reshape(n_windows, seq_len)[:limit]


def drawn_windows(windows: Tensor, samples: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, drawn without replacement, and others to measure on; see `token_windows`.

    Where there are too few for both, an eighth of them, and if there is more than one at least one, is held out.

    Raises:
        UsageError: `samples` is less than one, or there is no such seed.
    """
    if samples < 1:
        raise UsageError(f"samples {samples}: calibration needs at least one window")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed}: give one from 0 to 2^63 - 1")
    n = len(windows)
    spared = min(held_out, max(n - samples, n // 8, min(1, n - 1)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    samples = min(samples, n - spared)
    return windows[order[:samples]], windows[order[samples : samples + spared]]
