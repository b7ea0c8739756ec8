"""Turn text into windows, which are sequences of tokens of equal length."""

import os
from pydoc_data.topics import topics

import torch
from torch import Tensor

from freebits.errors import CheckpointError, UsageError
from freebits.integrations.loading import load_tokenizer
from freebits.integrations.packed_models import text_auto_class
from freebits.packed.reader import open_folder
from freebits.storage.checkpoint import is_adapter
from freebits.storage.hub import local_folder

_HELD_OUT_EVERY = 4


def embedded_text() -> tuple[str, str]:
    """Return a calibration text and a held-out text that share no paragraph.

    Both texts come from Python's documentation. Every fourth topic is held out. Some topics quote other topics, so the
    calibration text omits every paragraph that occurs in a held-out topic.
    """
    names = sorted(topics)
    held_out = [topics[name] for name in names[::_HELD_OUT_EVERY]]
    held_out_paragraphs = {paragraph for text in held_out for paragraph in text.split("\n\n")}
    others = (topics[name] for index, name in enumerate(names) if index % _HELD_OUT_EVERY)
    calibration = ("\n\n".join(p for p in text.split("\n\n") if p not in held_out_paragraphs) for text in others)
    return "\n\n".join(calibration), "\n\n".join(held_out)


def token_windows(path: str | os.PathLike[str], text: str, seq_len: int, limit: int | None = None) -> Tensor:
    """Cut a text into windows without overlap, (windows, seq_len), int64, and drop the incomplete last window.

    Args:
        path: folder or hub id of the model to which the tokenizer belongs.
        text: the text, tokenized as one document.
        seq_len: number of tokens per window.
        limit: maximum number of windows to return, from the start of the text; None returns all windows.

    Raises:
        UsageError: `seq_len` is less than two or exceeds the number of positions of the model, `limit` is less than
            one, or the text does not fill one window.
        CheckpointError: the model or its tokenizer cannot be read, or the tokenizer belongs to another model.
        UnsupportedModelError: see `text_auto_class`.
    """
    if seq_len < 2:
        raise UsageError(f"`seq_len` is {seq_len}: give at least 2, so that a window has a token to predict")
    if limit is not None and limit < 1:
        raise UsageError(f"`limit` is {limit}: give at least 1")
    path = local_folder(path)
    config = open_folder(path).config
    if not is_adapter(config):
        text_auto_class(config)
    tokenizer = load_tokenizer(path)
    n_positions, n_ids = config.get("max_position_embeddings"), config.get("vocab_size")
    if isinstance(n_positions, int) and seq_len > n_positions:
        raise UsageError(f"`seq_len` is {seq_len}: give at most {n_positions}, the number of positions of the model")
    tokens = tokenizer(text, verbose=False)["input_ids"]
    n_windows = len(tokens) // seq_len
    if not n_windows:
        raise UsageError(
            f"the text has {len(tokens)} tokens, but a window has {seq_len}: give a longer text or lower `seq_len`"
        )
    if isinstance(n_ids, int) and max(tokens) >= n_ids:
        raise CheckpointError(
            f"the tokenizer in {path} returns token ID {max(tokens)}, but vocab_size is {n_ids}: download the "
            "tokenizer files of this model again"
        )
    return torch.tensor(tokens[: n_windows * seq_len]).reshape(n_windows, seq_len)[:limit]


def split_windows(windows: Tensor, samples: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Select calibration windows and held-out windows, at random and without replacement.

    If there are too few windows for both, first reduce the held-out windows, down to an eighth of all windows (but at
    least one if there are two or more windows). Then reduce the calibration windows.

    Args:
        windows: (windows, T).
        samples: number of calibration windows.
        held_out: number of held-out windows.
        seed: seed for the selection.

    Returns:
        The calibration windows and the held-out windows, (windows, T).

    Raises:
        UsageError: `samples` is less than one, or `seed` is out of range.
    """
    if samples < 1:
        raise UsageError(f"`samples` is {samples}: give at least 1")
    if not 0 <= seed < 2**63:
        raise UsageError(f"`seed` is {seed}: give a number from 0 to 2^63 - 1")
    n = len(windows)
    n_held_out = min(held_out, max(n - samples, n // 8, min(1, n - 1)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    samples = min(samples, n - n_held_out)
    return windows[order[:samples]], windows[order[samples : samples + n_held_out]]
