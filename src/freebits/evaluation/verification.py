"""Check that a packed checkpoint is undamaged, and that it computes the same as the model that was packed."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from freebits.calibration.streamed import window_logits
from freebits.calibration.tokens import embedded_text, token_windows
from freebits.errors import CheckpointError, UsageError
from freebits.evaluation.perplexity import WINDOW, loss
from freebits.execution.progress import Progress, silent
from freebits.models.architecture import Part, Role, Weight
from freebits.models.free_bases import unproven_settings
from freebits.options import BIT_EXACT, FUNCTION_PRESERVING, LOSSY
from freebits.packed.reader import PackedFolder, open_folder
from freebits.storage.checkpoint import HISTORY, Folder, Source, is_adapter
from freebits.storage.hub import local_folder
from freebits.storage.signature import check_signature
from freebits.transforms.paired import free_pairs
from freebits.transforms.slicing import perplexity
from freebits.types import bytes_of

TOLERANCES = {FUNCTION_PRESERVING: (0.01, 1.01), LOSSY: (1.0, 1.5)}
"""Fidelity of the steps between two models → (largest mean KL in nats per token, largest ratio of perplexities)."""
WINDOWS = 8
_UNKNOWN = {"fidelity": None, "max_abs_logit_diff": None, "mean_kl": None, "ratio": None}


def verify(
    packed: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    text: str | None = None,
    seq_len: int = WINDOW,
    limit: int = WINDOWS,
    kl: float | None = None,
    ratio: float | None = None,
    key: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check every digest of a packed checkpoint and, with `against`, compare it with a reference model.

    If all steps between the models are bit-exact, config and tensors must be equal. Otherwise, two adapters must have
    the same config and, up to rounding, the same product of matrices in each layer. Other models are run on a text. All
    logits must be finite. The mean KL divergence must be at most 0.01 nats per token (1 if a step is lossy), and the
    ratio of perplexities, in either direction, at most 1.01 (1.5).

    Args:
        packed: folder of the packed checkpoint.
        against: folder of the model that was packed, or of an earlier one; if None, the tensors are only decoded.
        text: text on which both models are run; by default pages of Python's documentation (see `embedded_text`).
        seq_len: tokens per window.
        limit: largest number of windows to use.
        kl: largest mean KL divergence to accept; by default the tolerance above.
        ratio: largest ratio of perplexities to accept, in either direction; by default the tolerance above.
        key: file with a public key (PEM). If given, the signature of all files is checked first.
        progress: callback, called after each window.

    Returns:
        `ok`: whether no check failed. `failed`: the checks above that failed: `equal`, `product` (for adapters),
        `finite`, `kl` or `ratio`. `fidelity`: `bit-exact`, `function-preserving` or `lossy`, the worst of the steps
        between the models. `max_abs_logit_diff`: largest change of a logit. `mean_kl`: KL(reference ‖ packed) in nats
        per token. `perplexity` {`reference`, `packed`}. `ratio`: packed / reference. Values not measured are None.

    Raises:
        CheckpointError: a checkpoint or the signature is missing or damaged, or the vocabularies differ in size.
        UsageError: the text has too few tokens, or an argument is invalid.
        UnsupportedModelError: transformers cannot run one of the models on text.
    """
    _check_tolerances(kl, ratio)
    path = local_folder(packed)
    if key is not None:
        check_signature(path, key)
    folder = PackedFolder(path)
    folder.check()
    result: dict[str, Any] = {"ok": True, "failed": [], **_UNKNOWN, "perplexity": {"reference": None, "packed": None}}
    if against is None:
        return result
    reference = open_folder(local_folder(against))
    fidelity = _fidelity(folder, reference)
    if fidelity == BIT_EXACT:
        equal = _equal(folder, reference)
        return result | {"ok": equal, "failed": [] if equal else ["equal"], "fidelity": fidelity}
    if is_adapter(folder.config):
        return result | _same_products(folder, reference) | {"fidelity": fidelity}
    windows = token_windows(folder.path, embedded_text()[1] if text is None else text, seq_len, limit)
    measured = compare_models(reference.path, folder.path, windows, progress)
    return _judged(measured, fidelity, (kl, ratio))


def _judged(measured: dict[str, Any], fidelity: str, given: tuple[float | None, float | None]) -> dict[str, Any]:
    """Return the measured values and the failed checks. For a tolerance of None, use the default of `fidelity`."""
    tolerances = [
        default if value is None else value for value, default in zip(given, TOLERANCES[fidelity], strict=True)
    ]
    failed = _failed(measured, *tolerances)
    return {"ok": not failed, "failed": failed, "fidelity": fidelity, **measured}


def _check_tolerances(kl: float | None, ratio: float | None) -> None:
    for name, value, least in (("kl", kl, 0.0), ("ratio", ratio, 1.0)):
        if value is not None and not least <= value < math.inf:
            raise UsageError(f"`{name}` is {value}: give a number of at least {least:g}")


def _failed(measured: dict[str, Any], max_kl: float, max_ratio: float) -> list[str]:
    """Return the names of the checks that fail."""
    checks = {
        "finite": all(map(math.isfinite, (*measured["perplexity"].values(), measured["max_abs_logit_diff"]))),
        "kl": measured["mean_kl"] <= max_kl,
        "ratio": 1 / max_ratio <= measured["ratio"] <= max_ratio,
    }
    return [name for name, passed in checks.items() if not passed]


def _fidelity(packed: PackedFolder, reference: Folder) -> str:
    """Return the worst fidelity of the steps from the reference to the packed model.

    If the history of the packed model does not begin with that of the reference, the steps are unknown, and the result
    is `LOSSY`.
    """
    before, after = reference.history, packed.history
    between = after[len(before) :] if after[: len(before)] == before else [{"fidelity": LOSSY}]
    fidelities = {str(transform.get("fidelity")) for transform in between}
    if packed.manifest.exact and fidelities == {BIT_EXACT}:
        return BIT_EXACT
    return FUNCTION_PRESERVING if fidelities <= {BIT_EXACT, FUNCTION_PRESERVING} else LOSSY


def _equal(packed: PackedFolder, reference: Folder) -> bool:
    """Return whether two folders have the same config and the same tensors, bit for bit."""
    specs = packed.model_specs
    reference_specs = reference.model_specs if isinstance(reference, PackedFolder) else reference.specs
    if specs != reference_specs or _settings(packed) != _settings(reference):
        return False
    return all(bool((bytes_of(tensor) == bytes_of(reference[name])).all()) for name, tensor in packed.model_tensors())


def _settings(folder: Folder) -> dict[str, Any]:
    """Return a folder's config without the history of the model, which freebits adds."""
    return {key: value for key, value in folder.config.items() if key != HISTORY}


def _same_products(packed: PackedFolder, reference: Folder) -> dict[str, Any]:
    """Return whether two adapters have the same config and, up to rounding, the same product in each layer.

    If the config does not prove that a layer adds the product of its matrices, every tensor must be equal. The result
    has the entries `ok` and `failed` of the result of `verify`.
    """
    part = Part({name: Weight(name, Role.INNER, "") for name in packed.specs})
    unproven = unproven_settings(_settings(packed))
    pairs = [] if unproven else free_pairs(packed.specs, None, part, dense=True)
    paired = {name for pair in pairs for name in pair.names}
    same = packed.specs == reference.specs and _settings(packed) == _settings(reference)
    same = same and all(torch.equal(packed[name], reference[name]) for name in packed.specs.keys() - paired)
    for down, up in (pair.names for pair in pairs if same):
        before, after = (folder[up].double() @ folder[down].double() for folder in (reference, packed))
        eps = max(torch.finfo(packed.specs[name].dtype).eps for name in (down, up))
        same = bool((after - before).norm() <= 2 * eps * before.norm())
        if not same:
            break
    return {"ok": same, "failed": [] if same else ["product"]}


def compare_models(
    reference_path: Path,
    packed_path: Path,
    windows: Tensor,
    progress: Progress,
    view: Callable[[Source], Source] | None = None,
) -> dict[str, Any]:
    """Run two models block by block on the same windows, and compare their logits and perplexities.

    Args:
        reference_path: folder of the reference.
        packed_path: folder of the other model.
        windows: windows of tokens, (windows, seq_len), int64.
        progress: callback, called after each window.
        view: function that changes the tensors of the other model before it is run.

    Returns:
        `max_abs_logit_diff`, `mean_kl`, `ratio` and `perplexity`, as in the result of `verify`.

    Raises:
        CheckpointError: a checkpoint is damaged, or the vocabularies differ in size.
        UnsupportedModelError: see `window_logits`.
    """
    outputs = zip(window_logits(reference_path, windows), window_logits(packed_path, windows, view), strict=True)
    losses: tuple[list[float], list[float]] = ([], [])
    difference, divergence = torch.tensor(0.0), 0.0
    for done, (window, (reference, decoded)) in enumerate(zip(windows, outputs, strict=True), start=1):
        if reference.shape != decoded.shape:
            sizes = f"{decoded.shape[-1]} tokens, but that of {reference_path} has {reference.shape[-1]}"
            raise CheckpointError(f"the vocabulary of {packed_path} has {sizes}: give the model that was packed")
        difference = torch.maximum(difference, (reference - decoded).abs().max())  # `maximum` keeps a NaN
        log_p, log_q = log_softmax(reference, -1), log_softmax(decoded, -1)
        divergence += kl_div(log_q, log_p, log_target=True, reduction="batchmean").item() / len(windows)
        for values, output in zip(losses, (reference, decoded), strict=True):
            values.append(loss(output, window))
        progress("comparing", "window", done, len(windows))
    perplexities = dict(zip(("reference", "packed"), map(perplexity, losses), strict=True))
    finite = all(map(math.isfinite, perplexities.values()))
    return {
        "max_abs_logit_diff": difference.item(),
        "mean_kl": divergence,
        "ratio": perplexities["packed"] / perplexities["reference"] if finite else math.nan,
        "perplexity": perplexities,
    }
