"""Check that a packed checkpoint is undamaged, and that it is the model it was made from."""

import os
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from freebits.errors import CheckpointError
from freebits.evaluation.perplexity import WINDOW, logits, loss, mean_perplexity
from freebits.huggingface import load, token_windows
from freebits.packed import open_packed
from freebits.progress import Progress, silent
from freebits.text import embedded_text

PERPLEXITY_TOLERANCE = 1.01
WINDOWS = 8


def verify(
    packed: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    text: str | None = None,
    seq_len: int = WINDOW,
    limit: int = WINDOWS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check every digest of a packed checkpoint and, against the model it was made from, how close the functions are.

    Args:
        packed: folder of the packed checkpoint.
        against: folder of that model; without it only the digests are checked and every site is decoded.
        text: what to run both on; by default the embedded held-out text.
        seq_len: tokens a window.
        limit: use the first so many windows.
        progress: called after each window.

    Returns:
        `ok`: the packed perplexity is at most 1.01 times the reference; `max_abs_logit_diff`; `mean_kl` per token
        in nats, KL(reference ‖ packed); `perplexity` {`reference`, `packed`}. None where nothing was compared.

    Raises:
        CheckpointError: a folder is no sound checkpoint, or a digest does not match.
        UsageError: there are no windows of that length and number in the text.
    """
    open_packed(packed).check()
    if against is None:
        unknown = {"reference": None, "packed": None}
        return {"ok": True, "max_abs_logit_diff": None, "mean_kl": None, "perplexity": unknown}
    windows = token_windows(packed, embedded_text()[1] if text is None else text, seq_len, limit)
    models = [load(path, dtype=torch.float32).eval() for path in (against, packed)]
    losses: tuple[list[float], list[float]] = ([], [])
    difference = torch.tensor(0.0)
    divergence = 0.0
    for done, window in enumerate(windows, start=1):
        reference, decoded = (logits(model, window) for model in models)
        if reference.shape != decoded.shape:
            raise CheckpointError(f"{packed} and {against} have vocabularies of different sizes: not the same model")
        difference = torch.maximum(difference, (reference - decoded).abs().max())  # keeps a NaN
        log_p, log_q = log_softmax(reference, -1), log_softmax(decoded, -1)
        divergence += kl_div(log_q, log_p, log_target=True, reduction="batchmean").item() / len(windows)
        for values, output in zip(losses, (reference, decoded), strict=True):
            values.append(loss(output, window))
        progress(done, len(windows))
    perplexity = dict(zip(("reference", "packed"), map(mean_perplexity, losses), strict=True))
    return {
        "ok": perplexity["packed"] <= PERPLEXITY_TOLERANCE * perplexity["reference"],
        "max_abs_logit_diff": difference.item(),
        "mean_kl": divergence,
        "perplexity": perplexity,
    }
