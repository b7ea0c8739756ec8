"""Measure what a report shows, and write it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from freebits.calibration.tokens import embedded_text, token_windows
from freebits.errors import CheckpointError
from freebits.evaluation.charts import check_charts
from freebits.evaluation.inspection import inspect
from freebits.evaluation.page import page
from freebits.evaluation.perplexity import WINDOW
from freebits.evaluation.sizes import bits_by_tensor, bytes_on_disk
from freebits.evaluation.verification import WINDOWS, compared
from freebits.execution.progress import Progress, silent
from freebits.options import METHODS, NONE
from freebits.packed.packing import history_of
from freebits.packed.reader import opened
from freebits.storage.folder import Checkpoint, View
from freebits.storage.hub import located
from freebits.types import FLOATS, TensorSpec

COARSE = (8, 4)
"""Bits of the models beside which this one is shown."""
_GROUP, _SCALE_BITS = 32, 16
_DIGITS = 6
"""A number with so many is no block's."""


def write_report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] = "report.html",
    *,
    against: str | os.PathLike[str] | None = None,
    text: str | None = None,
    seq_len: int = WINDOW,
    limit: int = WINDOWS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a page that shows what a folder holds, how it was made, and how good it still is.

    The page is one file, with its charts in it. What is compared with a model is run block by block on the CPU: the
    model, the folder, and the model with every matrix rounded to 8 and to 4 bits.

    Args:
        folder: of a checkpoint, mostly a packed one.
        out: the page to write; it is replaced.
        against: the model that the folder was made from; without it nothing is run.
        text: what to run both on; by default the embedded held-out text.
        seq_len: tokens a window.
        limit: use the first so many windows.
        progress: called after each window of each comparison.

    Returns:
        `page`, where it is; `size`, bytes of the folder; `against`, what was measured as by `verify`, or None.

    Raises:
        CheckpointError: a folder is no sound checkpoint, or the page cannot be written.
        UsageError: matplotlib is missing, or there are no such windows in the text.
    """
    check_charts()
    page_at = Path(out)
    if not page_at.name or page_at.is_dir() or not page_at.absolute().parent.is_dir():
        raise CheckpointError(f"{out} cannot be written: give the name of a file in a folder that is there")
    path = located(folder)
    measured = _alone(path)
    if against is not None:
        model = located(against)
        windows = token_windows(model, embedded_text()[1] if text is None else text, seq_len, limit)
        told = "Python's documentation" if text is None else "the given text"
        measured |= _against(path, model, windows, progress) | {
            "text": f"{len(windows)} windows of {seq_len} tokens of {told}"
        }
    content = page(f"{path.absolute().name}: what freebits made of it", inspect(path), measured)
    draft = page_at.with_name(f".{page_at.name}.draft")
    try:
        draft.write_text(content, encoding="utf-8")
        draft.replace(page_at)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise CheckpointError(f"{out} cannot be written: {error.strerror}") from None
    return {"page": str(out), "size": measured["size"], "against": measured.get("against")}


def _alone(path: Path) -> dict[str, Any]:
    """What a folder tells without being run."""
    source = opened(path)
    bits = {name: of for name, of in bits_by_tensor(source).items() if len(source.specs[name].shape) == 2}
    return {"bits": bits, "part": {name: _part(name) for name in source.specs}, "size": bytes_on_disk(source)}


def _against(path: Path, model: Path, windows: Tensor, progress: Progress) -> dict[str, Any]:
    """What is measured beside the model a folder was made from."""
    dense, source = opened(model), opened(path)
    against = compared(model, path, windows, progress)
    coarse = {}
    for bits in COARSE:
        rounded = compared(model, model, windows, progress, partial(Coarse, bits=bits))
        coarse[str(bits)] = {**rounded, "size": _coarse_bytes(dense.specs, bits)}
    errors = {}
    before = history_of(dense.config) if isinstance(dense, Checkpoint) else dense.manifest.history
    after = history_of(source.config) if isinstance(source, Checkpoint) else source.manifest.history
    if {str(transform.get("transform")) for transform in after[len(before) :]} <= {
        *METHODS,
        NONE,
    }:  # others change the basis
        for name, spec in dense.specs.items():
            if len(spec.shape) == 2 and spec == source.specs.get(name) and spec.code in FLOATS:
                true = dense[name].double()
                errors[name] = ((source[name].double() - true).norm() / true.norm()).item()
    return {"against": against, "coarse": coarse, "errors": errors}


@dataclass(frozen=True)
class Coarse(View):
    """A model with every matrix rounded to the nearest of few steps, in groups of 32."""

    bits: int

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, rounded if it is a matrix."""
        tensor = self.source[name]
        if tensor.ndim < 2 or not tensor.is_floating_point():
            return tensor
        width = tensor.shape[-1]
        groups = pad(tensor.float(), (0, -width % _GROUP)).unflatten(-1, (-1, _GROUP))
        most = 2 ** (self.bits - 1) - 1
        scales = (groups.abs().amax(-1, keepdim=True) / most).half().float().clamp_min(torch.finfo(torch.half).tiny)
        return ((groups / scales).round().clamp(-most, most) * scales).flatten(-2)[..., :width].to(tensor.dtype)


def _coarse_bytes(specs: Mapping[str, TensorSpec], bits: int) -> int:
    """What a file of such a model takes, less its header."""
    a_number = (bits + _SCALE_BITS / _GROUP) / 8
    rounded = (len(spec.shape) > 1 and spec.code in FLOATS for spec in specs.values())
    return round(
        sum(spec.numel * a_number if of else spec.n_bytes for spec, of in zip(specs.values(), rounded, strict=True))
    )


def _part(name: str) -> tuple[int, str]:
    """Block and role of a tensor, as its name tells them; block -1 is what is in none."""
    words = name.removesuffix(".weight").split(".")
    numbers = [int(word) for word in words if word.isdecimal() and len(word) < _DIGITS]
    return (numbers[0] if numbers else -1), words[-1] if words[-1] not in ("down", "up") else ".".join(words[-2:])
