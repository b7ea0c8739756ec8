"""One command: look at a model, plan, make it smaller, check it against what it was, write down what came of it."""

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from freebits.api.pipelines import components, for_each, is_pipeline
from freebits.api.quantize import WINDOW, prepare
from freebits.calibration.tokens import embedded_text, token_windows
from freebits.errors import CheckpointError, UsageError
from freebits.evaluation.card import write_card
from freebits.evaluation.estimation import TYPICAL_ENTROPY
from freebits.evaluation.inspection import inspect
from freebits.evaluation.sizes import bytes_on_disk
from freebits.evaluation.verification import verify
from freebits.execution.executor import Executor, Parallel
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work, WorkStore
from freebits.integrations.gguf_models import write_dense
from freebits.integrations.packed_models import auto_class, reads_text
from freebits.options import LOSSY
from freebits.packed.packing import pack_into
from freebits.packed.piece import stage
from freebits.packed.reader import PackedFolder, opened
from freebits.quantization.rounding import FALLBACK_BITS, Goal
from freebits.quantized_inputs.source import readable
from freebits.storage.folder import Checkpoint
from freebits.storage.gguf import gguf_folder, is_gguf
from freebits.storage.hub import located
from freebits.storage.remote import original
from freebits.storage.signature import check_key, sign
from freebits.storage.staging import new_directory
from freebits.storage.task import unchanged

MAX_KL = 0.05
"""Without a target: the largest mean KL divergence, in nats per token."""
RUIN = 0.5
"""Mean KL divergence above which a model is not written without `force`."""
_TRIES = 3
_LEAP = 8.0
"""By how much more is tried next at most."""
_NEAR = 0.9
"""A mean KL divergence this near to its bound is near enough."""
_HELD_OUT = "pages of Python's documentation"


@dataclass(frozen=True)
class Plan:
    """What `compress` is going to do.

    Attributes:
        model: the folder.
        bytes: what it takes now.
        way: `lossless` or `integers`.
        at_most: bytes that the finished folder takes at most, if they are the target.
        about: bytes that it will take, as far as that is known without measuring.
        bits: for each number of a matrix, if they are the target.
        max_kl: the bound on the mean KL divergence, if that is the target.
    """

    model: str
    bytes: int
    way: str
    at_most: int | None = None
    about: int | None = None
    bits: float | None = None
    max_kl: float | None = None


@dataclass(frozen=True)
class _Options:
    """What `compress` is told besides its target; see there."""

    calibration: str | None
    text: str | None
    keep: Sequence[str]
    fallback_bits: float
    device: str
    force: bool


def compress(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target_size: int | None = None,
    target_ratio: float | None = None,
    bits: float | None = None,
    lossless: bool = False,
    max_kl: float | None = None,
    calibration: str | None = None,
    text: str | None = None,
    keep: Sequence[str] = (),
    fallback_bits: float = FALLBACK_BITS,
    revision: str | None = None,
    device: str = "cpu",
    parallel: Parallel = Parallel(),
    force: bool = False,
    dry_run: bool = False,
    sign_with: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Make a model smaller, to a size, to a number of bits, to a bound on what it costs, or without any loss.

    Args:
        model: folder of a checkpoint, its URL (`s3://…`, as fsspec knows them), or a model's id on the hub.
        out: folder to create; it appears complete or not at all.
        target_size: bytes that the finished folder takes at most, as `inspect` counts them.
        target_ratio: the same as a part of what the model takes now, in (0, 1).
        bits: for each number of a matrix on average.
        lossless: keep every bit: `unpack` gives the files back byte for byte.
        max_kl: the mean KL divergence from the model, in nats per token, that the result has at most on `text`; without
            any target 0.05.
        calibration: text; by default the model writes its own.
        text: to measure on; by default pages of Python's documentation, on which nothing is calibrated.
        keep: patterns of names of tensors that stay as they are, see `quantize`.
        fallback_bits: for each weight of matrices that calibration does not reach, see `quantize`.
        revision: of a model on the hub.
        device: where to run the model.
        parallel: who rounds and codes.
        force: write the model even if its mean KL divergence is more than 0.5.
        dry_run: say what would be done, and write nothing. Of a model on the hub only what lies beside the weights is
            read, and their headers.
        sign_with: file of a private key (PEM), with which every file of the folder is signed; see `verify`.
        progress: called after each step.

    Returns:
        `plan`. Without `dry_run` also what `inspect(out)` says; `fidelity`, which is what `verify` found, or of a model
        that transformers cannot run on a text `weight_error`, the relative error of rounded weights; `auto_class`,
        the class of transformers that loads the folder, or None; and `seconds`.

    Raises:
        UsageError: the arguments contradict each other, or the target ruins the model.
        CheckpointError: `model` is no sound checkpoint, or `out` exists.
        UnsupportedModelError: transformers does not run it, or not block by block.
    """
    check_key(sign_with)
    folder = located(model, revision, whole=not dry_run)
    if is_gguf(folder):
        given: dict[str, Any] = {"target_size": target_size, "target_ratio": target_ratio, "bits": bits}
        given |= {"max_kl": max_kl, "lossless": lossless, "calibration": calibration, "text": text, "keep": keep}
        given |= {"fallback_bits": fallback_bits, "device": device, "parallel": parallel, "force": force}
        with gguf_folder(folder) if lossless else _in_floats(folder, dry_run) as plain:
            told = compress(plain, out, **given, dry_run=dry_run, sign_with=sign_with, progress=progress)
        return told | {"plan": told["plan"] | {"model": str(folder)}}
    if is_pipeline(folder):
        if target_size is not None or max_kl is not None:
            raise UsageError("--target-size and --max-kl are for one model, not for a pipeline: give --target-ratio")
        more = {"fallback_bits": fallback_bits, "device": device, "parallel": parallel, "sign_with": sign_with}
        return _pipeline(folder, out, target_ratio, bits, lossless, keep, more, dry_run, progress)
    plan = planned(folder, target_size, target_ratio, bits, lossless, max_kl, fallback_bits)
    if dry_run:
        return {"plan": asdict(plan)}
    started = time.perf_counter()
    with new_directory(out) as directory:
        with unchanged(folder), parallel.executor() as executor:
            options = _Options(calibration, text, keep, fallback_bits, device, force)
            measured, coverage = _made(plan, folder, directory, options, executor, progress)
        loader = auto_class(opened(directory).config)
        write_card(directory, folder, measured, loader)
        if sign_with is not None:
            sign(directory, sign_with)
        facts = inspect(directory)
    return {
        **facts,
        "plan": asdict(plan),
        "fidelity": measured,
        "coverage": coverage,
        "auto_class": loader,
        "seconds": time.perf_counter() - started,
    }


@contextmanager
def _in_floats(gguf: Path, dry_run: bool) -> Iterator[Path]:
    """A folder with a GGUF file's model in floats."""
    if dry_run:
        raise UsageError("--dry-run of a GGUF file plans --lossless alone: the file has to be read for other targets")
    with TemporaryDirectory() as scratch:
        write_dense(gguf, Path(scratch))
        yield Path(scratch)


def _pipeline(
    folder: Path,
    out: str | os.PathLike[str],
    target_ratio: float | None,
    bits: float | None,
    lossless: bool,
    keep: Sequence[str],
    more: Mapping[str, Any],
    dry_run: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Make each model of a pipeline smaller, by the weights alone."""
    targets: dict[str, Any] = {"target_ratio": target_ratio, "bits": bits, "lossless": lossless}
    if dry_run:
        plans = {name: compress(folder / name, out, **targets, dry_run=True) for name in components(folder)}
        return {"kind": "pipeline", "components": plans}

    def each(model: Path, made: Path) -> dict[str, Any]:
        kept = [pattern for pattern in keep if any(fnmatchcase(name, pattern) for name in opened(model).specs)]
        return compress(model, made, **targets, keep=kept, progress=progress, **more)

    return for_each(folder, out, each)


def planned(
    folder: Path,
    target_size: int | None,
    target_ratio: float | None,
    bits: float | None,
    lossless: bool,
    max_kl: float | None,
    fallback_bits: float,
) -> Plan:
    """What to do for a target, of which there is one at most; nothing is read but headers."""
    source, name = opened(folder), original(folder) or str(folder)
    now = bytes_on_disk(source)
    if sum(target is not None for target in (target_size, target_ratio, bits, max_kl, lossless or None)) > 1:
        raise UsageError("--target-size, --target-ratio, --bits, --max-kl and --lossless are each a target: give one")
    if target_ratio is not None and not 0 < target_ratio < 1:
        raise UsageError(f"--target-ratio {target_ratio}: give a part of the model's size, such as 0.4")
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise UsageError(f"--max-kl {max_kl}: give nats per token, such as 0.05")
    size = target_size if target_ratio is None else math.floor(target_ratio * now)
    specs = source.specs.values()
    without_loss = round(sum(TYPICAL_ENTROPY.get(spec.code, 1.0) * spec.n_bytes for spec in specs))
    if lossless or (size is not None and 1.05 * without_loss < size and not isinstance(source, PackedFolder)):
        if isinstance(source, PackedFolder):
            raise CheckpointError(f"{folder} is packed already: it has no bits to lose")
        return Plan(name, now, "lossless", at_most=size, about=without_loss)
    if size is not None:
        return Plan(name, now, "integers", at_most=size, about=size)
    if max_kl is None and not reads_text(source.config):
        bits = fallback_bits if bits is None else bits
    if bits is not None:
        numbers = sum(spec.numel for spec in specs if len(spec.shape) > 1)
        rest = sum(spec.n_bytes for spec in specs if len(spec.shape) < 2)
        return Plan(name, now, "integers", about=round(bits * numbers / 8) + rest, bits=bits)
    return Plan(name, now, "integers", max_kl=MAX_KL if max_kl is None else max_kl)


def _made(
    plan: Plan,
    folder: Path,
    directory: Path,
    options: _Options,
    executor: Executor,
    progress: Progress,
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Do what is planned; what `verify` finds, and how much was rounded."""
    scratch = directory / ".scratch"
    scratch.mkdir()
    measured = _without_loss(plan, folder, scratch / "made", executor, progress) if plan.way == "lossless" else None
    coverage = None
    if measured is None:
        measured, coverage = _rounded(plan, folder, scratch, options, executor, progress)
    for file in (scratch / "made").iterdir():
        file.rename(directory / file.name)
    shutil.rmtree(scratch)
    return measured, coverage


def _without_loss(
    plan: Plan, folder: Path, made: Path, executor: Executor, progress: Progress
) -> dict[str, Any] | None:
    """Keep every bit, and look whether it is so; nothing where that takes more bytes than the plan has."""
    source = Checkpoint(folder)
    made.mkdir()
    sizes = {key: size for key, size in inspect(folder)["bytes"].items() if size is not None}
    pack_into(made, source, None, ("auto", stage("auto")), sizes, Work(executor), progress)
    size = bytes_on_disk(PackedFolder(made))
    if plan.at_most is not None and size > plan.at_most:
        return None
    measured = verify(made, against=folder)
    if not measured["ok"]:
        raise CheckpointError(f"what was packed differs from {folder}: this machine cannot be trusted")
    return measured


def _rounded(
    plan: Plan,
    folder: Path,
    scratch: Path,
    options: _Options,
    executor: Executor,
    progress: Progress,
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Round to the plan's target, in several tries where that is found by measuring; as `_made`."""
    text, positions = options.text, _positions(folder)
    held_out = embedded_text()[1] if text is None else text
    if reads_text(opened(folder).config):
        token_windows(folder, held_out, min(512, positions), 1)  # before anything takes long
    work = Work(executor, WorkStore(scratch / "finished"))
    prepared = prepare(
        *(folder, work),
        keep=options.keep,
        calibration=options.calibration,
        seq_len=min(WINDOW, positions),
        device=options.device,
        progress=progress,
    )
    if not prepared.calibrated:
        if plan.max_kl not in (None, MAX_KL):
            raise UsageError(f"--max-kl needs a text, but {prepared.facts['reason']}: give --bits or --target-size")
        (scratch / "made").mkdir()
        goal = Goal(plan.bits, plan.at_most, fallback_bits=options.fallback_bits)
        prepared.write(scratch / "made", goal, "auto", stage("auto"), executor, progress)
        return _weight_error(folder, PackedFolder(scratch / "made")), prepared.coverage
    wanted = None if plan.max_kl is None else plan.max_kl / 2
    tried: list[tuple[float, float]] = []
    while True:
        shutil.rmtree(scratch / "made", ignore_errors=True)
        (scratch / "made").mkdir()
        goal = Goal(plan.bits, plan.at_most, wanted, fallback_bits=options.fallback_bits)
        prepared.write(scratch / "made", goal, "auto", stage("auto"), executor, progress)
        measured = verify(
            scratch / "made", against=folder, text=held_out, seq_len=min(512, positions), progress=progress
        ) | {"text": _HELD_OUT if text is None else "the text that was given"}
        kl = measured["mean_kl"]
        searches = plan.max_kl is not None and kl > plan.max_kl
        if not kl <= RUIN and not options.force and not searches:
            raise UsageError(
                f"this target ruins the model: mean KL {kl:.2f} nats per token, perplexity x {measured['ratio']:.2f} "
                f"on {measured['text']}; choose a larger target, or set `force`"
            )
        if wanted is None or plan.max_kl is None or not math.isfinite(kl):
            return measured, prepared.coverage
        tried.append((wanted, kl))
        if _NEAR * plan.max_kl <= kl <= plan.max_kl:
            return measured, prepared.coverage
        if len(tried) >= _TRIES and kl <= plan.max_kl:
            return measured, prepared.coverage
        if len(tried) >= 2 * _TRIES:
            raise UsageError(f"a mean KL of {plan.max_kl} was not reached: {kl:.3g} at the finest steps; give more")
        wanted *= min(0.95 * plan.max_kl / kl, _LEAP) if kl else _LEAP


def _weight_error(folder: Path, made: PackedFolder) -> dict[str, Any]:
    """The relative error of the weights that were rounded, as a root mean square."""
    source = readable(folder)
    error = size = 0.0
    for name in source.specs:
        before, after = source[name], made[name]
        if before.is_floating_point() and not torch.equal(before, after):
            error += (after.double() - before.double()).square().sum().item()
            size += before.double().square().sum().item()
    return {"fidelity": LOSSY, "mean_kl": None, "weight_error": math.sqrt(error / size) if size else 0.0}


def _positions(folder: Path) -> int:
    told = opened(folder).config
    sizes = [told[key] for key in ("max_position_embeddings", "n_positions") if isinstance(told.get(key), int)]
    return min(sizes, default=512)
