"""Measure the values for an HTML report, and write the report."""

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
from freebits.evaluation.folder_sizes import bits_by_tensor, bytes_on_disk
from freebits.evaluation.html_page import page
from freebits.evaluation.inspection import inspect
from freebits.evaluation.perplexity import WINDOW
from freebits.evaluation.verification import WINDOWS, compare_models
from freebits.execution.progress import Progress, silent
from freebits.options import METHODS, NONE
from freebits.packed.reader import open_folder
from freebits.storage.checkpoint import Folder, View
from freebits.storage.hub import local_folder
from freebits.types import FLOATS, TensorSpec

ROUNDED_BITS = (8, 4)
"""Bits of the rounded models that the report shows for comparison."""
_GROUP, _SCALE_BITS = 32, 16
"""Weights per group of the rounded models, and bits of the scale of a group."""
_MAX_DIGITS = 5
"""Largest number of digits of a block number in the name of a tensor."""


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
    """Write an HTML page about the contents, the history and the quality of a folder.

    The page is one file with inline charts. With `against`, four models are run block by block on the CPU: the original
    model, the model in the folder, and the original model with every matrix rounded to 8 bits and to 4 bits.

    Args:
        folder: folder of a checkpoint, usually a packed one.
        out: page to write; an existing file is replaced.
        against: folder of the original model; if None, no model is run.
        text: text to measure on; by default pages of Python's documentation (see `embedded_text`).
        seq_len: tokens per window.
        limit: largest number of windows to use.
        progress: callback, called after each window of each comparison.

    Returns:
        `page`: path of the page. `size`: size of the folder in bytes, counted as in `inspect`. `against`: the
        comparison of the model in the folder with the original model; None without `against`. It has the entries
        `max_abs_logit_diff`, `mean_kl`, `perplexity` and `ratio` of the result of `verify`.

    Raises:
        CheckpointError: a checkpoint is damaged, the vocabularies differ in size, or the page cannot be written.
        UsageError: matplotlib is missing, the text has too few tokens, or an argument is invalid.
        UnsupportedModelError: `against` is given, but transformers cannot run a model on text.
    """
    check_charts()
    target = Path(out)
    if not target.name or target.is_dir() or not target.absolute().parent.is_dir():
        raise CheckpointError(f"{out} cannot be written: give the name of a file in an existing folder")
    path = local_folder(folder)
    measured = _measured_from_headers(path)
    if against is not None:
        model = local_folder(against)
        windows = token_windows(model, embedded_text()[1] if text is None else text, seq_len, limit)
        text_name = "Python's documentation" if text is None else "the given text"
        measured |= _compared(path, model, windows, progress)
        measured["text"] = f"{len(windows)} windows of {seq_len} tokens of {text_name}"
    content = page(f"freebits report: {path.absolute().name}", inspect(path), measured)
    staged = target.with_name(f".{target.name}.staging")
    try:
        staged.write_text(content, encoding="utf-8")
        staged.replace(target)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise CheckpointError(
            f"{out} cannot be written ({error.strerror}): check the disk, or choose another file"
        ) from None
    return {"page": str(out), "size": measured["size"], "against": measured.get("against")}


def _measured_from_headers(path: Path) -> dict[str, Any]:
    """Return the bits of each matrix, the place of each tensor and the size of a folder, without running the model."""
    source = open_folder(path)
    bits = {name: value for name, value in bits_by_tensor(source).items() if len(source.specs[name].shape) == 2}
    return {"bits": bits, "places": {name: _place(name) for name in source.specs}, "size": bytes_on_disk(source)}


def _compared(path: Path, model: Path, windows: Tensor, progress: Progress) -> dict[str, Any]:
    """Compare the original model with the model in a folder, and with rounded versions of the original model."""
    dense, source = open_folder(model), open_folder(path)
    against = compare_models(model, path, windows, progress)
    rounded = {}
    for bits in ROUNDED_BITS:
        result = compare_models(model, model, windows, progress, partial(RoundedView, bits=bits))
        rounded[str(bits)] = {**result, "size": _rounded_bytes(dense.specs, bits)}
    return {"against": against, "rounded": rounded, "errors": _errors(dense, source)}


def _errors(dense: Folder, source: Folder) -> dict[str, float]:
    """Return name of a matrix → relative error.

    The result is empty if a step since the original model is neither a quantization nor the codec `none`, because such
    a step can change the bases, and errors would then mean nothing.
    """
    before, after = (folder.history for folder in (dense, source))
    errors: dict[str, float] = {}
    if not {str(transform.get("transform")) for transform in after[len(before) :]} <= {*METHODS, NONE}:
        return errors
    for name, spec in dense.specs.items():
        if len(spec.shape) == 2 and spec == source.specs.get(name) and spec.dtype_name in FLOATS:
            original = dense[name].double()
            errors[name] = ((source[name].double() - original).norm() / original.norm()).item()
    return errors


@dataclass(frozen=True)
class RoundedView(View):
    """A model with every matrix rounded to the nearest integers of `bits` bits, with one scale per group of 32."""

    bits: int

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor `name`, rounded if it is a matrix."""
        tensor = self.source[name]
        if tensor.ndim < 2 or not tensor.is_floating_point():
            return tensor
        width = tensor.shape[-1]
        groups = pad(tensor.float(), (0, -width % _GROUP)).unflatten(-1, (-1, _GROUP))
        largest = 2 ** (self.bits - 1) - 1
        scales = (groups.abs().amax(-1, keepdim=True) / largest).half().float().clamp_min(torch.finfo(torch.half).tiny)
        return ((groups / scales).round().clamp(-largest, largest) * scales).flatten(-2)[..., :width].to(tensor.dtype)


def _rounded_bytes(specs: Mapping[str, TensorSpec], bits: int) -> int:
    """Return the bytes of a rounded model, without file headers."""
    bytes_per_weight = (bits + _SCALE_BITS / _GROUP) / 8
    return round(
        sum(
            spec.numel * bytes_per_weight if len(spec.shape) > 1 and spec.dtype_name in FLOATS else spec.n_bytes
            for spec in specs.values()
        )
    )


def _place(name: str) -> tuple[int, str]:
    """Return the block and the role of a tensor, derived from its name. Block -1 stands for a tensor in no block."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [int(part) for part in parts if part.isdecimal() and len(part) <= _MAX_DIGITS]
    return (numbers[0] if numbers else -1), parts[-1] if parts[-1] not in ("down", "up") else ".".join(parts[-2:])
