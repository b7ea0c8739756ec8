"""Quantize a checkpoint, and write a packed folder."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.api.shared_steps import finish
from freebits.calibration.engine import MAX_RESIDENT_BYTES
from freebits.calibration.groups import RunningModel
from freebits.calibration.self_generated import self_generated_windows
from freebits.calibration.tokens import split_windows, token_windows
from freebits.dequantization.source import open_as_floats
from freebits.errors import UnsupportedModelError, UsageError
from freebits.evaluation.inspection import known_sizes
from freebits.execution.executor import Executor, Parallel
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work
from freebits.integrations.loading import load
from freebits.integrations.packed_models import text_auto_class
from freebits.options import EMBEDDINGS, HADAMARD, INTEGERS, LOSSY, PARTS, ROTATIONS, TRELLIS
from freebits.packed.encoded_piece import stage
from freebits.packed.open_base import OpenBase
from freebits.packed.packing import publish
from freebits.quantization.differences import Differences
from freebits.quantization.measuring import measure_matrices
from freebits.quantization.rounding import FALLBACK_BITS, LEAST_DIFFERENCE_BITS, Goal, write_rounded
from freebits.quantization.sensitivity_cache import Matrix, SensitivityCache, fully_covered_matrices
from freebits.quantization.weights_only import coverage_report, names_to_keep, routers_to_keep, uncalibrated
from freebits.storage.checkpoint import Folder, history_step
from freebits.storage.hub import local_folder
from freebits.storage.resumption import Task, file_states, text_digest
from freebits.storage.signature import check_key
from freebits.storage.staging import new_directory

_log = logging.getLogger(__name__)
_NO_TEXT = "none"
SAMPLES, WINDOW = 32, 256
"""`SAMPLES`: default number of windows of calibration text. `WINDOW`: default number of tokens per window."""
_COMPARED, _TOLERANCE = 16, 1e-3
"""The engine is compared with transformers on `_COMPARED` tokens. The largest difference of a logit may be `_TOLERANCE`
times the largest magnitude of a logit."""


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: float | None = None,
    target_size: int | None = None,
    target_kl: float | None = None,
    method: str = INTEGERS,
    trellis: int = TRELLIS,
    rotate: str = "none",
    only: str | None = None,
    keep: Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
    fallback_bits: float = FALLBACK_BITS,
    calibration: str | None = None,
    samples: int = SAMPLES,
    seq_len: int = WINDOW,
    seed: int = 0,
    device: str = "cpu",
    entropy: str = "auto",
    parallel: Parallel = Parallel(),
    resume: bool = True,
    sign_with: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Quantize the matrices of a checkpoint. This is lossy.

    Matrices of the language model are calibrated on text. Other matrices, such as those of a vision tower, are rounded
    without calibration. If transformers cannot run the model on text, all matrices are rounded without calibration.
    Vectors, small routers and some other tensors stay unchanged; `coverage` lists them with the reasons.

    Memory holds about three blocks in float32, and the activations and Gram matrices of a block. It holds the whole
    model while the model generates calibration text, or if the model takes at most 1 GiB in float32.

    Args:
        model: folder of a dense or sliced checkpoint, or of one that was packed with the codec `canonical`.
        out: folder to create; if the function fails, no such folder is left.
        bits: average bits per weight of the matrices, including their scales and other side data; by default 4.
        target_size: largest size of the finished folder in bytes, counted as in `inspect`; replaces `bits`.
        target_kl: expected mean KL divergence on the calibration text, in nats per token; replaces `bits`.
        method: `integers` rounds each weight to an integer times a scale, and entropy-codes the integers. The scales
            are such that one more bit would reduce the expected loss equally, whichever matrix gets it. `pyramid`
            rounds groups of weights to vectors of integers whose absolute values have a given sum (pyramid vectors).
        trellis: number of states (4, 8, 16, …, 256) of a trellis along which method `integers` rounds each column, or 0
            for no trellis. In odd states, a weight is rounded to an integer plus 1/2, times a scale. At the same bit
            rate, the expected KL divergence is 22 % smaller with 8 states than without a trellis, and 24 % smaller with
            32 states. More states take more time. Method `pyramid` ignores this argument.
        rotate: `hadamard` rotates each matrix on both sides before rounding, and rotates it back during decoding. This
            improves the quality of method `pyramid` much, and that of `integers` not at all.
        only: `linear` quantizes only the matrices of the blocks, `embeddings` only the embedding and the head.
        keep: patterns for the names of tensors to leave unchanged, such as `vision_tower.*`.
        base: folder or hub id of the model from which `model` was trained. The differences from its matrices are
            rounded instead of the matrices. Loading adds the differences to the base, and therefore needs the base.
            `bits` can then be as small as 0.1. No trellis is used, because each sum is rounded to the dtype of the
            model, which would undo the gain of a trellis.
        fallback_bits: average bits per weight of the matrices that are rounded without calibration. If no matrix is
            calibrated, and `bits` or `target_size` is given, this target replaces `fallback_bits`.
        calibration: text to calibrate on; by default the model generates the text.
        samples: number of windows of calibration text; fewer if the text is too short.
        seq_len: tokens per window.
        seed: seed for all random choices.
        device: device on which to run the model.
        entropy: entropy stage for tensors that are not quantized; see `pack`.
        parallel: options for rounding in parallel, and for measuring in parallel if the text is split into several
            groups of windows.
        resume: whether to use the finished measurements of a stopped run with the same arguments. Rounding always
            starts again.
        sign_with: file with a private key (PEM), which signs every file of the folder; see `verify`.
        progress: callback, called after each generated token, then after each measured block or group of windows,
            then after each rounded group of matrices.

    Returns:
        The entries of `inspect(out)`, and `coverage`, a dict that says which weights are rounded. `share`: the fraction
        of the weights that are rounded. `uncalibrated`: the fraction of the weights that are rounded without
        calibration. `alone`: list of the tensors that are rounded without calibration. `left`: list of the tensors that
        are not rounded. An entry of a list has `tensors`, a name with `*` for numbers; `weights`, the number of weights
        of all tensors with such a name; and `reason`. If the model was run on text, `experts` is the number of expert
        matrices, and `undersampled` is the number of expert matrices with fewer than 64 input vectors.

    Raises:
        UsageError: an argument is invalid, or the target cannot be reached.
        CheckpointError: `model` or `base` is not a sound checkpoint, or `out` already exists.
        UnsupportedModelError: no matrix can be quantized, or the arguments require calibration, but transformers cannot
            run the model on text.
    """
    check_key(sign_with)
    least_bits = 1.0 if base is None else LEAST_DIFFERENCE_BITS
    trellis = trellis if base is None else 0
    goal = Goal(bits, target_size, target_kl, method, fallback_bits, trellis, least_bits)
    if rotate not in ROTATIONS:
        raise UsageError(f"`rotate` is {rotate!r}: choose {' or '.join(ROTATIONS)}")
    if only not in (None, *PARTS):
        raise UsageError(f"`only` is {only!r}: choose {' or '.join(PARTS)}")
    entropy_code, model = stage(entropy), local_folder(model)
    arguments: dict[str, Any] = {
        "method": method,
        "trellis": trellis,
        "bits": bits,
        "size": target_size,
        "kl": target_kl,
    }
    opened_base = None if base is None else OpenBase.open(base, Path(out))
    arguments["base"] = opened_base and [str(base), file_states(opened_base.folder.path)]
    arguments |= {"rotate": rotate, "only": only, "keep": [*keep], "fallback_bits": fallback_bits}
    arguments |= {"samples": samples, "seq_len": seq_len, "seed": seed, "device": device, "entropy": entropy}
    task = Task("quantize", Path(model), arguments | {"text": text_digest(calibration)}, resume)
    with new_directory(out, task) as directory, parallel.executor() as executor:
        prepared = prepare(
            model,
            Work(executor, task.store(directory)),
            rotate=rotate,
            only=only,
            keep=keep,
            base=opened_base,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            progress=progress,
        )
        prepared.write(directory, goal, entropy, entropy_code, executor, progress)
        return finish(directory, prepared.source.path, sign_with) | {"coverage": prepared.coverage}


@dataclass(frozen=True)
class Prepared:
    """A model with measured sensitivities, ready to be rounded.

    Attributes:
        source: checkpoint of the model.
        cache: measurements of the matrices that are rounded to a goal. These are the calibrated matrices or, if there
            are none, all matrices that are rounded.
        fallback_cache: measurements of the other matrices, which are rounded to the `fallback_bits` of the goal.
        facts: settings with which the sensitivities were measured; the history of the result records them.
        sizes: sizes of the model in bytes; see `inspect`.
        coverage: which weights are rounded; see `quantize`.
        differences: the model as differences from its base; None if there is no base.
    """

    source: Folder
    cache: SensitivityCache
    fallback_cache: SensitivityCache
    facts: Mapping[str, Any]
    sizes: Mapping[str, int]
    coverage: Mapping[str, Any]
    differences: Differences | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the model was run on calibration text."""
        return self.facts["text"] != _NO_TEXT

    def write(
        self,
        directory: Path,
        goal: Goal,
        entropy: str,
        entropy_code: str | None,
        executor: Executor,
        progress: Progress,
    ) -> None:
        """Round the model to a goal, and write a packed folder.

        Raises:
            UsageError: the goal cannot be reached.
            UnsupportedModelError: the goal requires calibration, but the model was not calibrated.
        """
        if not self.calibrated:
            if goal.kl is not None or goal.method != INTEGERS:
                option = "`target_kl`" if goal.kl is not None else f"`method` {goal.method}"
                advice = "give `bits`" if goal.kl is not None else f"choose {INTEGERS}"
                raise UnsupportedModelError(f"{option} requires calibration, but {self.facts['reason']}: {advice}")
            goal = goal if goal.size or goal.bits else replace(goal, bits=goal.fallback_bits)
        source = self.source
        contents = write_rounded(
            directory, source, self.cache, self.fallback_cache, goal, entropy_code, executor, progress, self.differences
        )
        facts = {**goal.facts, **self.facts, "share": self.coverage["share"]}
        step = history_step(goal.method, LOSSY, self.sizes, **facts)
        base = self.differences.base if self.differences else None
        publish(directory, source, contents, source.config, (goal.method, entropy), [*source.history, step], base)


def prepare(
    model: str | os.PathLike[str],
    work: Work,
    *,
    rotate: str = "none",
    only: str | None = None,
    keep: Sequence[str] = (),
    base: OpenBase | None = None,
    run: bool = True,
    calibration: str | None = None,
    samples: int = SAMPLES,
    seq_len: int = WINDOW,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Prepared:
    """Measure how sensitive a model is to errors in each of its matrices. `quantize` documents arguments and errors.

    If `run` is false, the model is not run, and all matrices are rounded without calibration.

    The store of `work` must exist as long as the result is used, because the result refers to data in the store.
    """
    source = open_as_floats(model)
    torch_device = device_of(device)
    load_tokens = partial(_tokens, source.path, calibration, samples, seq_len, seed, torch_device, progress)
    rotation_seed = seed if rotate == HADAMARD else None
    unchanged = names_to_keep(source, keep)
    differences = None if base is None else Differences.of(source, base)
    if differences:
        unchanged |= dict.fromkeys(differences.equal, "equal to the base")
    matrices: list[Matrix] = []
    facts: dict[str, Any] = {"rotate": rotate, "text": _NO_TEXT}
    experts: dict[str, int] = {}
    try:
        _check_runnable(source, run)
        running = RunningModel(source.path, torch_device)
        tokens = work.once("text", load_tokens)
        _check_engine(running, tokens)
        measured = measure_matrices(running, tokens, work, seed, rotation_seed, progress)
    except UnsupportedModelError as error:
        if only is not None:
            raise
        _log.warning("freebits: matrices are rounded without calibration: %s", error)
        facts["reason"] = str(error)
    else:
        facts |= {"text": "its own" if calibration is None else "given", "samples": len(tokens), "seq_len": seq_len}
        facts["seed"] = seed
        experts = {"experts": measured.n_experts, "undersampled": measured.n_undersampled}
        unchanged = routers_to_keep(source, measured.router_tensors) | unchanged
        excluded = {*unchanged, *measured.router_tensors}
        covered = fully_covered_matrices(measured.matrices, source)
        matrices = [matrix for matrix in _selected(covered, running, only) if matrix.tensor not in excluded]
    cache = SensitivityCache(
        work, differences or source, rotation_seed, differences.base_tensors if differences else None
    )
    calibrated = {matrix.tensor for matrix in matrices}
    fallback_matrices = [] if only is not None else uncalibrated(source, calibrated, unchanged)
    cache.add([*matrices, *fallback_matrices])
    fallback = {matrix.tensor for matrix in fallback_matrices}
    coverage = coverage_report(source, calibrated, fallback, unchanged) | experts
    if not fallback and not calibrated:
        raise UnsupportedModelError(f"{source.path} has no matrix to quantize: run freebits pack instead")
    targeted = calibrated or fallback
    caches = cache.only(targeted), cache.only(fallback - targeted)
    return Prepared(source, *caches, facts, known_sizes(model), coverage, differences)


def _check_runnable(source: Folder, run: bool) -> None:
    """Raise an `UnsupportedModelError` if a model predicts no text, or `run` is false."""
    text_auto_class(source.config)
    if not run:
        raise UnsupportedModelError(f"{source.path} has no tokenizer")


def _selected(matrices: list[Matrix], running: RunningModel, only: str | None) -> list[Matrix]:
    """Return the matrices of the part of the model that `only` names, or all if `only` is None."""
    if only is None:
        return matrices
    names = (running.engine.embedding, running.engine.head)
    embeddings = {running.named.checkpoint_name(name) for name in names if name}
    return [matrix for matrix in matrices if (matrix.tensor in embeddings) == (only == EMBEDDINGS)]


@torch.no_grad()
def _check_engine(running: RunningModel, tokens: Tensor) -> None:
    """Compare the engine's logits with those of transformers on a few tokens, if the model is small enough.

    Raises:
        UnsupportedModelError: the logits differ by more than rounding errors.
    """
    if 4 * sum(spec.numel for spec in open_as_floats(running.path).specs.values()) > MAX_RESIDENT_BYTES:
        return
    window = tokens[:1, :_COMPARED]
    expected = _transformers_logits(running, window)  # computed first, so that memory never holds both models
    [actual] = running.engine.logits(window)
    if expected is None or not expected.isfinite().all():  # calibration reports overflows and other failures
        return
    if not (actual - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        raise UnsupportedModelError(
            "this model gives different logits when it is run block by block than in transformers: please report its "
            f"model type, {running.engine.model.config.model_type!r}"
        )


def _transformers_logits(running: RunningModel, window: Tensor) -> Tensor | None:
    """Return transformers' logits for all tokens of a window but the first, (T - 1, V); None if transformers fails."""
    model = load(running.path, dtype=torch.float32).to(running.device).eval()
    with suppress(Exception):  # if the engine also fails, it reports the cause
        logits: Tensor = model(input_ids=window.to(running.device), use_cache=False).logits[0, :-1]
        return logits
    return None


def _tokens(
    path: Path, text: str | None, samples: int, seq_len: int, seed: int, device: torch.device, progress: Progress
) -> Tensor:
    """Return the calibration windows, (n, seq_len), int64, where `n` is at most `samples`."""
    if text is None:
        return self_generated_windows(path, samples, seq_len, seed, device, progress)
    windows = split_windows(token_windows(path, text, seq_len), samples, 0, seed)[0]
    if len(windows) < samples:
        _log.warning(
            "freebits: the text has %d windows of %d tokens instead of %d, which makes calibration less accurate",
            len(windows),
            seq_len,
            samples,
        )
    return windows
