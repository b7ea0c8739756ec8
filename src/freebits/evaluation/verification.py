"""Check that a packed checkpoint is undamaged, and that it is the model it was made from."""

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
from freebits.models.pairs import unproven_settings
from freebits.models.table import Part, Role, Weight
from freebits.options import BIT_EXACT, FUNCTION_PRESERVING, LOSSY
from freebits.packed.packing import HISTORY, history_of
from freebits.packed.reader import PackedFolder, opened
from freebits.storage.folder import Checkpoint, Source, is_adapter
from freebits.storage.hub import located
from freebits.storage.signature import check_signature
from freebits.transforms.paired import free_pairs
from freebits.transforms.slicing import perplexity
from freebits.types import bytes_of

TOLERANCES = {FUNCTION_PRESERVING: (0.01, 1.01), LOSSY: (1.0, 1.5)}
"""Fidelity of the moves between two models → largest mean KL, in nats per token, and largest ratio of perplexities."""
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
    """Check every digest of a packed checkpoint and, against a model it was made from, how close the two are.

    Config and tensors are compared bit for bit with what codec `none` packed; of other adapters the config and every
    layer's product. Other models are run on a text, both of them. Three gates say whether they are the same function:
    every logit is finite; the mean KL divergence is small; the perplexities' ratio is near 1 on either side. What is
    small enough depends on the moves between: 0.01 nats and 1.01 if all keep the function, 1 and 1.5 if one is lossy.

    Args:
        packed: folder of the packed checkpoint.
        against: folder of the model it was made from, or of one before; without it everything is decoded and checked.
        text: what to run both on; by default the embedded held-out text.
        seq_len: tokens a window.
        limit: use the first so many windows.
        kl: the largest mean KL divergence, where it is not to be as above.
        ratio: the largest ratio of perplexities, in either direction, likewise.
        key: file of a public key (PEM): first of all, every file of the folder must be what its owner signed.
        progress: called after each window.

    Returns:
        `ok`; `failed`, the gates that do not hold, of `equal`, `product` (of an adapter), `finite`, `kl`, `ratio`;
        `fidelity` of the moves in between; `max_abs_logit_diff`; `mean_kl` per token in nats, KL(reference ‖ packed);
        `ratio`, packed to reference; `perplexity` {`reference`, `packed`}. None where nothing was compared.

    Raises:
        CheckpointError: a folder is no sound checkpoint, a digest does not match, or it is not what was signed.
        UsageError: there are no windows of that length and number in the text, or a tolerance makes no sense.
    """
    _check_tolerances(kl, ratio)
    path = located(packed)
    if key is not None:
        check_signature(path, key)
    folder = PackedFolder(path)
    folder.check()
    nothing: dict[str, Any] = {"ok": True, "failed": [], **_UNKNOWN, "perplexity": {"reference": None, "packed": None}}
    if against is None:
        return nothing
    reference = opened(located(against))
    fidelity = _fidelity(
        folder, history_of(reference.config) if isinstance(reference, Checkpoint) else reference.manifest.history
    )
    if fidelity == BIT_EXACT:
        equal = _equal(folder, reference)
        return nothing | {"ok": equal, "failed": [] if equal else ["equal"], "fidelity": fidelity}
    if is_adapter(folder.config):
        return nothing | _same_products(folder, reference) | {"fidelity": fidelity}
    windows = token_windows(folder.path, embedded_text()[1] if text is None else text, seq_len, limit)
    measured = compared(reference.path, folder.path, windows, progress)
    return _judged(measured, fidelity, (kl, ratio))


def _judged(measured: dict[str, Any], fidelity: str, told: tuple[float | None, float | None]) -> dict[str, Any]:
    """What was measured, and whether it is within what was told or what its fidelity allows."""
    limits = [one if one is not None else of for one, of in zip(told, TOLERANCES[fidelity], strict=True)]
    failed = _failed(measured, *limits)
    return {"ok": not failed, "failed": failed, "fidelity": fidelity, **measured}


def _check_tolerances(kl: float | None, ratio: float | None) -> None:
    for name, value, least in (("kl", kl, 0.0), ("ratio", ratio, 1.0)):
        if value is not None and not least <= value < math.inf:
            raise UsageError(f"--{name} {value}: give a number of at least {least:g}")


def _failed(measured: dict[str, Any], max_kl: float, most_ratio: float) -> list[str]:
    """The gates that do not hold."""
    gates = {
        "finite": all(map(math.isfinite, (*measured["perplexity"].values(), measured["max_abs_logit_diff"]))),
        "kl": measured["mean_kl"] <= max_kl,
        "ratio": 1 / most_ratio <= measured["ratio"] <= most_ratio,
    }
    return [name for name, holds in gates.items() if not holds]


def _fidelity(packed: PackedFolder, before: list[dict[str, Any]]) -> str:
    """The worst of the moves that lead from the reference to the packed model, lossy where they are not known."""
    transforms = packed.manifest.history
    between = transforms[len(before) :] if transforms[: len(before)] == before else [{"fidelity": LOSSY}]
    told = {str(transform.get("fidelity")) for transform in between}
    if packed.manifest.exact and told == {BIT_EXACT}:
        return BIT_EXACT
    return FUNCTION_PRESERVING if told <= {BIT_EXACT, FUNCTION_PRESERVING} else LOSSY


def _equal(packed: PackedFolder, reference: Checkpoint | PackedFolder) -> bool:
    """Whether two folders have the same config and the same tensors, bit for bit."""
    specs = packed.model_specs
    theirs = reference.model_specs if isinstance(reference, PackedFolder) else reference.specs
    if specs != theirs or _settings(packed) != _settings(reference):
        return False
    return all(bool((bytes_of(tensor) == bytes_of(reference[name])).all()) for name, tensor in packed.model_tensors())


def _settings(folder: Checkpoint | PackedFolder) -> dict[str, Any]:
    """A folder's config without our history."""
    return {key: value for key, value in folder.config.items() if key != HISTORY}


def _same_products(packed: PackedFolder, reference: Checkpoint | PackedFolder) -> dict[str, Any]:
    """Whether two adapters have the same config and each layer adds the same, up to the rounding of its two matrices.

    Unless the config proves that a layer adds the product of its matrices, every tensor must be the same.
    """
    part = Part({name: Weight(name, Role.INNER, "") for name in packed.specs})
    unproven = unproven_settings(_settings(packed))
    pairs = [] if unproven else free_pairs(packed.specs, None, part, dense=True)
    paired = {name for pair in pairs for name in pair.names}
    same = packed.specs == reference.specs and _settings(packed) == _settings(reference)
    same = same and all(torch.equal(packed[name], reference[name]) for name in packed.specs.keys() - paired)
    for down, up in (pair.names for pair in pairs if same):
        before, after = (of[up].double() @ of[down].double() for of in (reference, packed))
        eps = max(torch.finfo(packed.specs[name].dtype).eps for name in (down, up))
        same = bool((after - before).norm() <= 2 * eps * before.norm())
        if not same:
            break
    return {"ok": same, "failed": [] if same else ["product"]}


def compared(
    reference_path: Path,
    packed_path: Path,
    windows: Tensor,
    progress: Progress,
    seen: Callable[[Source], Source] | None = None,
) -> dict[str, Any]:
    """What two models make of the same windows: the reference, then the packed one, as `seen`; block by block."""
    outputs = zip(window_logits(reference_path, windows), window_logits(packed_path, windows, seen), strict=True)
    losses: tuple[list[float], list[float]] = ([], [])
    difference, divergence = torch.tensor(0.0), 0.0
    for done, (window, (reference, decoded)) in enumerate(zip(windows, outputs, strict=True), start=1):
        if reference.shape != decoded.shape:
            raise CheckpointError("the two models have vocabularies of different sizes: they are not the same model")
        difference = torch.maximum(difference, (reference - decoded).abs().max())  # keeps a NaN
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
