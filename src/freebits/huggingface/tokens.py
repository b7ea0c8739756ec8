"""Text to windows of tokens."""

import os

import torch
from torch import Tensor

from freebits.checkpoint import Checkpoint
from freebits.errors import CheckpointError, UsageError
from freebits.huggingface.loading import load_tokenizer


def token_windows(path: str | os.PathLike[str], text: str, seq_len: int, limit: int | None = None) -> Tensor:
    """A text cut into windows that do not overlap, (windows, seq_len), int64; a shorter rest is dropped.

    Args:
        path: folder with the tokenizer.
        text: what to tokenize, as one document.
        seq_len: tokens a window.
        limit: take the first so many windows only.

    Raises:
        UsageError: `seq_len` is less than two, `limit` less than one, or the text does not fill one window.
        CheckpointError: see `load_tokenizer`; or the tokenizer is another model's.
    """
    if seq_len < 2:
        raise UsageError(f"a window of {seq_len} tokens predicts nothing: give --seq-len of at least 2")
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} windows measure nothing: give --limit of at least 1")
    tokens = load_tokenizer(path)(text, verbose=False)["input_ids"]
    n_windows = len(tokens) // seq_len
    if not n_windows:
        raise UsageError(f"the text has {len(tokens)} tokens, less than one window of {seq_len}: lower --seq-len")
    n_ids = Checkpoint(path).config.get("vocab_size")
    if isinstance(n_ids, int) and max(tokens) >= n_ids:
        raise CheckpointError(f"{path}: the tokenizer's token {max(tokens)} is not in a vocab_size of {n_ids}")
    return torch.tensor(tokens[: n_windows * seq_len]).reshape(n_windows, seq_len)[:limit]
