"""Quantize a checkpoint folder into a packed one."""

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

from freebits.calibration.engine import HELD_WHOLE
from freebits.calibration.groups import RunningModel
from freebits.calibration.self_generated import self_generated_windows
from freebits.calibration.tokens import drawn_windows, token_windows
from freebits.errors import UnsupportedModelError, UsageError
from freebits.evaluation.card import write_card
from freebits.evaluation.inspection import inspect, known_sizes
from freebits.execution.executor import Executor, Parallel
from freebits.execution.machine import device_of
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work
from freebits.integrations.loading import load
from freebits.integrations.packed_models import auto_for_text
from freebits.options import EMBEDDINGS, HADAMARD, INTEGERS, LOSSY, PARTS, ROTATIONS, RTN
from freebits.packed.packing import history_of, publish
from freebits.packed.piece import stage
from freebits.packed.reader import PackedFolder
from freebits.quantization.measuring import measure_matrices
from freebits.quantization.rate_control import RateModel
from freebits.quantization.rounding import FALLBACK_BITS, Goal, write_rounded
from freebits.quantization.sensitivity_cache import Matrix, SensitivityCache, whole_tensors
from freebits.quantization.weights_only import choosing_kept, coverage_of, names_to_keep, uncalibrated
from freebits.quantized_inputs.source import readable
from freebits.storage.folder import Checkpoint
from freebits.storage.hub import located
from freebits.storage.signature import check_key, sign
from freebits.storage.staging import new_directory
from freebits.storage.task import Task, text_digest
from freebits.version import __version__

_log = logging.getLogger(__name__)
_NO_TEXT = "none"
SAMPLES, WINDOW = 32, 256
_COMPARED, _ROUNDING = 16, 1e-3
"""Tokens on which the engine is compared with the library's model, and the largest difference of logits."""


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: float | None = None,
    target_size: int | None = None,
    target_kl: float | None = None,
    method: str = INTEGERS,
    rotate: str = "none",
    only: str | None = None,
    keep: Sequence[str] = (),
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
    """Quantize the matrices of a checkpoint: lossy.

    Matrices of the language model are calibrated on a text. The others, such as those of a vision tower, are rounded
    by their weights alone; so is a model that transformers cannot run on a text.

    Args:
        model: folder of a dense or sliced checkpoint, or of a packed canonical one.
        out: folder to create; it appears complete or not at all.
        bits: for each number of a matrix on average, everything counted that the matrices take; by default 4.
        target_size: instead, bytes that the finished folder takes at most, as `inspect` counts them.
        target_kl: instead, KL divergence in nats per token that is to be expected on text as the model writes it.
        method: `integers` of any size, at steps worth the same everywhere, entropy-coded; `pyramid` vectors; or, to
            compare with, `gptq` and `rtn`: whole bits in groups of 64, with feedback and to the nearest.
        rotate: `hadamard` rounds each matrix rotated on both sides and turns it back when it is decoded: integers gain
            nothing by that, the other methods much.
        only: quantize only the matrices of the blocks (`linear`), or those of embedding and head (`embeddings`).
        keep: patterns of names of tensors that stay as they are, such as `vision_tower.*`.
        fallback_bits: for each weight of the matrices that calibration does not reach, on average; if it reaches none,
            only where there is no other target.
        calibration: text; by default the model writes its own.
        samples: windows of calibration text.
        seq_len: tokens a window.
        seed: of everything that is drawn.
        device: where to run the model.
        entropy: stage for what is not quantized, as in `pack`.
        parallel: who rounds, and who measures where the text has several groups of windows: threads, or Ray.
        resume: go on with what a stopped run of the same arguments left, block by block.
        sign_with: file of a private key (PEM), with which every file of the folder is signed; see `verify`.
        progress: called after each step.

    Returns:
        What `inspect(out)` says, and `coverage`, see `coverage_of`.

    Raises:
        UsageError: an argument makes no sense.
        CheckpointError: `model` is no sound checkpoint, or `out` exists.
        UnsupportedModelError: what is asked for needs calibration, and transformers cannot run the model on a text.
    """
    check_key(sign_with)
    goal = Goal(bits, target_size, target_kl, method, fallback_bits)
    if rotate not in ROTATIONS or only not in (None, *PARTS):
        raise UsageError(f"there is no rotation {rotate!r} or no part {only!r}: see freebits quantize --help")
    code, model = stage(entropy), located(model)
    said: dict[str, Any] = {
        "method": method,
        "bits": bits,
        "size": target_size,
        "kl": target_kl,
        "rotate": rotate,
        "only": only,
    }
    said |= {"samples": samples, "seq_len": seq_len, "seed": seed, "device": device, "entropy": entropy}
    said |= {"keep": [*keep], "fallback_bits": fallback_bits}
    task = Task("quantize", Path(model), said | {"text": text_digest(calibration)}, resume)
    with new_directory(out, task) as directory, parallel.executor() as executor:
        prepared = prepare(
            *(model, Work(executor, task.store(directory))),
            rotate=rotate,
            only=only,
            keep=keep,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            progress=progress,
        )
        prepared.write(directory, goal, entropy, code, executor, progress)
        write_card(directory, prepared.source.path)
        if sign_with is not None:
            sign(directory, sign_with)
        return inspect(directory) | {"coverage": prepared.coverage}


@dataclass(frozen=True)
class Prepared:
    """A model of which is known how much depends on each of its matrices.

    Attributes:
        source: the model.
        cache: what is known of the matrices that are rounded to a goal.
        alone: what is known of those that no calibration reaches, where it reaches some.
        facts: how that was measured, for the history.
        sizes: what `inspect` says of the model's.
        coverage: see `coverage_of`.
    """

    source: Checkpoint | PackedFolder
    cache: SensitivityCache
    alone: SensitivityCache
    facts: Mapping[str, Any]
    sizes: Mapping[str, int]
    coverage: Mapping[str, Any]

    @property
    def calibrated(self) -> bool:
        """Whether calibration reached a matrix."""
        return self.facts["text"] != _NO_TEXT

    def expected_kl(self, bits: float) -> float:
        """KL divergence in nats per token, on text as the model writes it, at so many bits per weight on average."""
        n_weights = self.cache.n_weights
        return float(RateModel.sum(self.cache.rate_models.values()).c(bits * n_weights)) ** 2 * n_weights / 24

    def write(
        self, directory: Path, goal: Goal, entropy: str, code: str | None, executor: Executor, progress: Progress
    ) -> None:
        """Round it, and make a packed folder of that."""
        if not self.calibrated:
            if goal.kl is not None or goal.method not in (INTEGERS, RTN):
                what = "--target-kl" if goal.kl is not None else f"method {goal.method}"
                raise UnsupportedModelError(f"{what} needs calibration, but {self.facts['reason']}: give --bits")
            goal = goal if goal.size or goal.bits else replace(goal, bits=goal.fallback_bits)
        contents = write_rounded(directory, self.source, self.cache, self.alone, goal, code, executor, progress)
        transform = {
            "transform": goal.method,
            "fidelity": LOSSY,
            **goal.facts,
            **self.facts,
            "share": self.coverage["share"],
            "bytes": dict(self.sizes),
            "producer": f"freebits {__version__}",
        }
        source = self.source
        before = source.manifest.history if isinstance(source, PackedFolder) else history_of(source.config)
        publish(directory, source, contents, source.config, (goal.method, entropy), [*before, transform])


def prepare(
    model: str | os.PathLike[str],
    work: Work,
    *,
    rotate: str = "none",
    only: str | None = None,
    keep: Sequence[str] = (),
    calibration: str | None = None,
    samples: int = SAMPLES,
    seq_len: int = WINDOW,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Prepared:
    """Measure how much a model depends on each of its matrices; arguments as of `quantize`.

    What is found is kept in the store of `work`, which must last as long as it is used.
    """
    source = readable(model)
    where = device_of(device)
    write = partial(_tokens, source.path, calibration, samples, seq_len, seed, where, progress)
    rotation = seed if rotate == HADAMARD else None
    kept = names_to_keep(source, keep)
    matrices: list[Matrix] = []
    facts: dict[str, Any] = {"rotate": rotate, "text": _NO_TEXT}
    experts: dict[str, int] = {}
    try:
        auto_for_text(source.config)
        running = RunningModel(source.path, where)
        tokens = work.once("text", write)
        _check_engine(running, tokens)
        measured = measure_matrices(running, tokens, work, seed, rotation, progress)
    except UnsupportedModelError as error:
        if only is not None:
            raise
        _log.warning("freebits: no calibration, as %s: matrices are rounded by their weights alone", error)
        facts["reason"] = str(error)
    else:
        facts |= {"text": "its own" if calibration is None else "given", "samples": len(tokens), "seq_len": seq_len}
        facts["seed"] = seed
        experts = {"experts": measured.n_experts, "undersampled": measured.n_undersampled}
        kept = choosing_kept(source, measured.choosing) | kept
        unknown = {*kept, *measured.choosing}
        matrices = [matrix for matrix in whole_tensors(measured.matrices, source) if matrix.tensor not in unknown]
        if only is not None:
            ends = (running.engine.embedding, running.engine.head)
            embeddings = {running.named.in_file(name) for name in ends if name}
            matrices = [matrix for matrix in matrices if (matrix.tensor in embeddings) == (only == EMBEDDINGS)]
    cache = SensitivityCache(work, source, rotation)
    calibrated = {matrix.tensor for matrix in matrices}
    rest = [] if only is not None else uncalibrated(source, calibrated, kept)
    cache.add([*matrices, *rest])
    alone = {matrix.tensor for matrix in rest}
    coverage = coverage_of(source, calibrated, alone, kept) | experts
    if not alone and not calibrated:
        raise UnsupportedModelError(f"{source.path} has no matrix to round: freebits pack keeps every bit of it")
    goals = calibrated or alone
    return Prepared(source, cache.only(goals), cache.only(alone - goals), facts, known_sizes(model), coverage)


@torch.no_grad()
def _check_engine(running: RunningModel, tokens: Tensor) -> None:
    """Compare the engine's logits with those of the library's model on a few tokens, if that model is small.

    Raises:
        UnsupportedModelError: they differ by more than rounding.
    """
    if 4 * sum(spec.numel for spec in readable(running.path).specs.values()) > HELD_WHOLE:
        return
    few = tokens[:1, :_COMPARED]
    expected = _plain_logits(running, few)  # before the engine has the model, too
    [found] = running.engine.logits(few)
    if expected is None:  # the library itself cannot run this class on a text
        return
    if not expected.isfinite().all():
        return  # which is said once the text has run through it
    if not (found - expected).abs().max() <= _ROUNDING * expected.abs().max():
        raise UnsupportedModelError(
            "run block by block this model gives other logits than run by transformers as a whole: please report its "
            f"type, {running.engine.model.config.model_type!r}"
        )


def _plain_logits(running: RunningModel, window: Tensor) -> Tensor | None:
    """The logits that the library's model gives for the tokens after the first of a window, (T - 1, V), if it runs."""
    plain = load(running.path, dtype=torch.float32).to(running.device).eval()
    with suppress(Exception):  # the library's kinds of error are many; the engine says which it is
        logits: Tensor = plain(input_ids=window.to(running.device), use_cache=False).logits[0, :-1]
        return logits
    return None


def _tokens(
    path: Path, text: str | None, samples: int, seq_len: int, seed: int, device: torch.device, progress: Progress
) -> Tensor:
    """The calibration windows, (samples, seq_len)."""
    if text is None:
        return self_generated_windows(path, samples, seq_len, seed, device, progress)
    windows = drawn_windows(token_windows(path, text, seq_len), samples, 0, seed)[0]
    if len(windows) < samples:
        _log.warning(
            "freebits: the text has %d windows of %d tokens, where %d were asked for: calibration on little text is "
            "less accurate",
            *(len(windows), seq_len, samples),
        )
    return windows
