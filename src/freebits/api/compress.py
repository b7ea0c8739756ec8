"""Make a model smaller in one call: plan, pack or quantize, compare with the original, and write a model card."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from freebits.api.pipelines import components, for_each, is_pipeline
from freebits.api.quantize import WINDOW, prepare
from freebits.api.shared_steps import finish
from freebits.calibration.tokens import embedded_text, token_windows
from freebits.dequantization.source import open_as_floats
from freebits.errors import CheckpointError, UsageError
from freebits.evaluation.estimation import TYPICAL_ENTROPY
from freebits.evaluation.folder_sizes import bytes_on_disk
from freebits.evaluation.inspection import inspect
from freebits.evaluation.verification import verify
from freebits.execution.executor import Executor, Parallel
from freebits.execution.progress import Progress, silent
from freebits.execution.work_store import Work, WorkStore
from freebits.integrations.gguf_models import write_dense
from freebits.integrations.loading import has_tokenizer
from freebits.integrations.packed_models import auto_class, predicts_text
from freebits.options import LOSSY, TRELLIS
from freebits.packed.encoded_piece import stage
from freebits.packed.open_base import OpenBase
from freebits.packed.packing import pack_into
from freebits.packed.reader import PackedFolder, open_folder
from freebits.quantization.rounding import FALLBACK_BITS, LEAST_DIFFERENCE_BITS, Goal
from freebits.quantization.trellis import check_trellis
from freebits.storage.checkpoint import Checkpoint
from freebits.storage.gguf import gguf_folder, is_gguf
from freebits.storage.hub import local_folder
from freebits.storage.remote import original
from freebits.storage.resumption import unchanged
from freebits.storage.signature import check_key
from freebits.storage.staging import new_directory

MAX_KL = 0.05
"""Largest mean KL divergence, in nats per token, if no target is given and the model runs on text."""
RUINOUS_KL = 0.5
"""Mean KL divergence, in nats per token, above which a model is written only with `force`."""
_TRIES = 3
"""Number of tries after which the search accepts any result within the bound. It fails after twice as many tries."""
_MAX_FACTOR = 8.0
"""Largest factor by which the expected KL divergence grows from one try to the next."""
_CLOSE_ENOUGH = 0.9
"""The search stops if the mean KL divergence is at most its bound and at least this fraction of the bound."""
_DEFAULT_TEXT_NAME = "pages of Python's documentation"
_SCRATCH = ".scratch"
"""Name of the folder for measurements in the staging directory."""


@dataclass(frozen=True)
class Plan:
    """The actions that `compress` plans.

    Attributes:
        model: folder or URL of the model.
        bytes: size in bytes of the model before compression. For a GGUF file without the argument `lossless`, it is the
            size of the conversion to float16.
        way: method, either `lossless` or `integers` (quantization).
        at_most: largest size of the finished folder in bytes; None if no size is required.
        about: expected size in bytes; None if estimating it requires measurements.
        bits: target for the average bits per weight of the matrices; None if there is no such target.
        max_kl: bound on the mean KL divergence in nats per token; None if no bound is required.
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
    """Arguments of `compress`, which documents them. The plan contains the targets; its `max_kl` can be the default."""

    calibration: str | None
    text: str | None
    keep: Sequence[str]
    base: OpenBase | None
    fallback_bits: float
    trellis: int
    device: str
    force: bool
    max_kl: float | None


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
    base: str | os.PathLike[str] | None = None,
    fallback_bits: float = FALLBACK_BITS,
    trellis: int = TRELLIS,
    revision: str | None = None,
    device: str = "cpu",
    parallel: Parallel = Parallel(),
    force: bool = False,
    dry_run: bool = False,
    sign_with: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Make a model smaller. The target is a size, a number of bits, a bound on the KL divergence, or no loss.

    Args:
        model: folder of a checkpoint or of a pipeline (several models), URL of such a folder (`s3://…` or another that
            fsspec supports), id of a model on the hub, or GGUF file.
        out: folder to create; if the function fails, no such folder is left.
        target_size: largest size of the finished folder in bytes, counted as in `inspect`.
        target_ratio: largest size of the finished folder, as a fraction of the size of `model`, in (0, 1). For a GGUF
            file, it is a fraction of the size of the conversion to float16.
        bits: average bits per weight of the matrices.
        lossless: whether to keep every bit; `unpack` then restores config and weights files byte for byte.
        max_kl: largest mean KL divergence from the original model on `text`, in nats per token. If no target is
            given, the target is `max_kl=0.05`, or `bits=fallback_bits` if the model does not run on text.
        calibration: text to calibrate on; by default the model generates the text.
        text: text on which the result is compared with the original; by default pages of Python's documentation.
        keep: patterns for the names of tensors to leave unchanged; see `quantize`.
        base: folder or hub id of the model from which `model` was trained. Only the differences from `base` are
            stored. They are rounded, or kept bit for bit with `lossless`; see `quantize` and `pack`.
        fallback_bits: average bits per weight of the matrices that are rounded without calibration; see `quantize`.
        trellis: number of states of the trellis, or 0 for no trellis; see `quantize`.
        revision: branch, tag or commit of a model on the hub.
        device: device on which to run the model.
        parallel: options for rounding and coding in parallel.
        force: whether to write the model even if its mean KL divergence is more than 0.5 nats per token.
        dry_run: whether to return the plan and write nothing. The weights of a model on the hub are then not
            downloaded, except for their headers.
        sign_with: file with a private key (PEM), which signs every file of the folder; see `verify`. For a
            pipeline, it signs the folder of each model, but not the other files.
        progress: callback, called often: after each generated token, block, window or group of matrices.

    Returns:
        `plan`: the chosen method and targets; its keys are the attributes of `Plan`. Without `dry_run`, the dict also
        has the entries of `inspect(out)` and the following ones.

        `fidelity`: the result of `verify` against `model`, and `text`, a description of the text if the models were
        run on one. If a quantized model cannot be run on text, this dict has only three keys: `fidelity`, which
        is `lossy`; `mean_kl`, which is None; and `weight_error`, which is `‖after - before‖ / ‖before‖` over all
        tensors that rounding changed. `coverage`: which weights are rounded, as in the result of `quantize`; None if
        no matrix was rounded. `auto_class`: name of the Auto class of transformers that loads the folder; None if there
        is none. `seconds`: how long compression took.

        For a pipeline, the result has only `kind`, which is `pipeline`, and `components`: name of a model → its result.

    Raises:
        UsageError: an argument is invalid, arguments contradict each other, or the target ruins the model or cannot be
            reached.
        CheckpointError: `model` or `base` is not a sound checkpoint, `model` is packed and `lossless` is set, or `out`
            already exists.
        UnsupportedModelError: freebits cannot compress the model, for example because no matrix can be quantized.
    """
    check_key(sign_with)
    check_trellis(trellis)
    _check_targets(target_size, target_ratio, bits, lossless, max_kl)
    folder = local_folder(model, revision, whole=not dry_run)
    if base is not None and (is_gguf(folder) or is_pipeline(folder)):
        raise UsageError(f"{folder} is a GGUF file or a pipeline, which takes no base: leave out `base`")
    if is_gguf(folder):
        options: dict[str, Any] = {"target_size": target_size, "target_ratio": target_ratio, "bits": bits}
        options |= {"max_kl": max_kl, "lossless": lossless, "calibration": calibration, "text": text, "keep": keep}
        options |= {
            "trellis": trellis,
            "fallback_bits": fallback_bits,
            "device": device,
            "parallel": parallel,
            "force": force,
        }
        with gguf_folder(folder) if lossless else _dense_folder(folder, dry_run) as converted:
            result = compress(converted, out, **options, dry_run=dry_run, sign_with=sign_with, progress=progress)
        return result | {"plan": result["plan"] | {"model": str(folder)}}
    if is_pipeline(folder):
        if target_size is not None or max_kl is not None:
            raise UsageError("`target_size` and `max_kl` cannot be used for a pipeline of models: give `target_ratio`")
        if calibration is not None or text is not None:
            raise UsageError("`calibration` and `text` cannot be used for a pipeline of models: leave them out")
        options = {"fallback_bits": fallback_bits, "trellis": trellis, "device": device, "force": force}
        options |= {"parallel": parallel, "sign_with": sign_with}
        return _compress_pipeline(folder, out, target_ratio, bits, lossless, keep, options, dry_run, progress)
    plan = make_plan(folder, target_size, target_ratio, bits, lossless, max_kl, fallback_bits)
    if dry_run:
        return {"plan": asdict(plan)}
    started = time.perf_counter()
    opened_base = None if base is None else OpenBase.open(base, Path(out))
    with new_directory(out) as directory:
        with unchanged(folder), parallel.executor() as executor:
            fidelity, coverage = _execute(
                plan,
                folder,
                directory,
                _Options(calibration, text, keep, opened_base, fallback_bits, trellis, device, force, max_kl),
                executor,
                progress,
            )
        loader = auto_class(open_folder(directory).config)
        facts = finish(directory, folder, sign_with, measured=fidelity, auto_class=loader)
    return {
        **facts,
        "plan": asdict(plan),
        "fidelity": fidelity,
        "coverage": coverage,
        "auto_class": loader,
        "seconds": time.perf_counter() - started,
    }


@contextmanager
def _dense_folder(gguf: Path, dry_run: bool) -> Iterator[Path]:
    """Until the `with` block ends, provide a temporary folder with the model of a GGUF file, converted to float16."""
    if dry_run:
        raise UsageError("`dry_run` with a GGUF file supports only `lossless`: set `lossless`, or leave out `dry_run`")
    with TemporaryDirectory() as scratch:
        write_dense(gguf, Path(scratch))
        yield Path(scratch)


def _compress_pipeline(
    folder: Path,
    out: str | os.PathLike[str],
    target_ratio: float | None,
    bits: float | None,
    lossless: bool,
    keep: Sequence[str],
    options: Mapping[str, Any],
    dry_run: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Compress each model of a pipeline by `compress`, and copy the other files. With `dry_run`, return the plans."""
    targets: dict[str, Any] = {"target_ratio": target_ratio, "bits": bits, "lossless": lossless}
    if dry_run:
        fallback_bits = options["fallback_bits"]
        plans = {
            name: compress(folder / name, out, **targets, fallback_bits=fallback_bits, dry_run=True)
            for name in components(folder)
        }
        return {"kind": "pipeline", "components": plans}

    def compress_component(model: Path, target: Path) -> dict[str, Any]:
        patterns = [pattern for pattern in keep if any(fnmatchcase(name, pattern) for name in open_folder(model).specs)]
        return compress(model, target, **targets, keep=patterns, progress=progress, **options)

    return for_each(folder, out, compress_component)


def _check_targets(
    target_size: int | None, target_ratio: float | None, bits: float | None, lossless: bool, max_kl: float | None
) -> None:
    """Raise a `UsageError` if there are several targets, or one is out of range."""
    if sum(target is not None for target in (target_size, target_ratio, bits, max_kl, lossless or None)) > 1:
        raise UsageError(
            "`target_size`, `target_ratio`, `bits`, `max_kl` and `lossless` cannot be combined: give only one"
        )
    if target_ratio is not None and not 0 < target_ratio < 1:
        raise UsageError(f"`target_ratio` is {target_ratio}: give a fraction between 0 and 1, such as 0.4")
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise UsageError(f"`max_kl` is {max_kl}: give nats per token above 0, such as 0.05")


def make_plan(
    folder: Path,
    target_size: int | None,
    target_ratio: float | None,
    bits: float | None,
    lossless: bool,
    max_kl: float | None,
    fallback_bits: float,
) -> Plan:
    """Choose how to reach the target. This reads only the headers of the weights.

    Raises:
        CheckpointError: the folder is damaged, or is packed already and `lossless` is set.
    """
    source, name = open_folder(folder), original(folder) or str(folder)
    present_size = bytes_on_disk(source)
    size = target_size if target_ratio is None else math.floor(target_ratio * present_size)
    specs = source.specs.values()
    lossless_size = round(sum(TYPICAL_ENTROPY.get(spec.dtype_name, 1.0) * spec.n_bytes for spec in specs))
    if lossless or (size is not None and 1.05 * lossless_size < size and not isinstance(source, PackedFolder)):
        if isinstance(source, PackedFolder):
            raise CheckpointError(
                f"{folder} is already packed, and `lossless` cannot make it smaller: give another target"
            )
        return Plan(name, present_size, "lossless", at_most=size, about=lossless_size)
    if size is not None:
        return Plan(name, present_size, "integers", at_most=size, about=size)
    if max_kl is None and not _runs_on_text(folder, source.config):
        bits = fallback_bits if bits is None else bits
    if bits is not None:
        n_weights = sum(spec.numel for spec in specs if len(spec.shape) > 1)
        vector_bytes = sum(spec.n_bytes for spec in specs if len(spec.shape) < 2)
        return Plan(name, present_size, "integers", about=round(bits * n_weights / 8) + vector_bytes, bits=bits)
    return Plan(name, present_size, "integers", max_kl=MAX_KL if max_kl is None else max_kl)


def _runs_on_text(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a model predicts text. A model of a pipeline must also have a tokenizer, which most do not."""
    return predicts_text(config) and (has_tokenizer(folder) or not is_pipeline(folder.parent))


def _execute(
    plan: Plan,
    folder: Path,
    directory: Path,
    options: _Options,
    executor: Executor,
    progress: Progress,
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Carry out the plan. Return fidelity and coverage as `compress` does."""
    fidelity = coverage = None
    if plan.way == "lossless":
        fidelity = _pack_lossless(plan, folder, directory, options.base, executor, progress)
    if fidelity is None:
        fidelity, coverage = _quantize(plan, folder, directory, options, executor, progress)
        shutil.rmtree(directory / _SCRATCH)
    return fidelity, coverage


def _clear(directory: Path) -> None:
    """Delete what an earlier try wrote into a folder, except the measurements."""
    for path in directory.iterdir():
        if path.is_dir() and path.name != _SCRATCH:
            shutil.rmtree(path)
        elif not path.is_dir():
            path.unlink()


def _pack_lossless(
    plan: Plan, folder: Path, directory: Path, base: OpenBase | None, executor: Executor, progress: Progress
) -> dict[str, Any] | None:
    """Pack bit for bit and return the result of `verify`, or None if the packed folder is larger than planned."""
    source = Checkpoint(folder)
    sizes = {key: size for key, size in inspect(folder)["bytes"].items() if size is not None}
    pack_into(directory, source, None, ("auto", stage("auto")), sizes, Work(executor), progress, base)
    size = bytes_on_disk(PackedFolder(directory))
    if plan.at_most is not None and size > plan.at_most:
        _clear(directory)
        return None
    fidelity = verify(directory, against=folder)
    if not fidelity["ok"]:
        raise CheckpointError(
            f"the packed copy of {folder} differs from the original: check this machine's memory and disk"
        )
    return fidelity


def _quantize(
    plan: Plan,
    folder: Path,
    directory: Path,
    options: _Options,
    executor: Executor,
    progress: Progress,
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Round the matrices to the plan's target. Return fidelity and coverage as `compress` does.

    A bound on the KL divergence can require several tries.
    """
    text, positions = options.text, _max_positions(folder)
    held_out = embedded_text()[1] if text is None else text
    on_text = _runs_on_text(folder, open_folder(folder).config)
    if on_text:
        token_windows(folder, held_out, min(512, positions), 1)  # to fail early if the text cannot be used
    prepared = prepare(
        folder,
        Work(executor, WorkStore(directory / _SCRATCH)),
        keep=options.keep,
        base=options.base,
        run=on_text,
        calibration=options.calibration,
        seq_len=min(WINDOW, positions),
        device=options.device,
        progress=progress,
    )
    least_bits = 1.0 if options.base is None else LEAST_DIFFERENCE_BITS

    def write(expected_kl: float | None) -> None:
        _clear(directory)
        targets = plan.bits, plan.at_most, expected_kl
        trellis = options.trellis if options.base is None else 0
        goal = Goal(*targets, fallback_bits=options.fallback_bits, trellis=trellis, least_bits=least_bits)
        prepared.write(directory, goal, "auto", stage("auto"), executor, progress)

    def measure() -> dict[str, Any]:
        fidelity = verify(directory, against=folder, text=held_out, seq_len=min(512, positions), progress=progress)
        return fidelity | {"text": _DEFAULT_TEXT_NAME if text is None else "the text that was given"}

    if prepared.calibrated:
        return _search(plan, write, measure, options.force), prepared.coverage
    if options.max_kl is not None:
        reason = prepared.facts["reason"]
        raise UsageError(f"`max_kl` requires running the model on text, but {reason}: give `bits` or `target_size`")
    write(None)
    return _weight_error(folder, PackedFolder(directory)), prepared.coverage


def _search(
    plan: Plan, write: Callable[[float | None], None], measure: Callable[[], dict[str, Any]], force: bool
) -> dict[str, Any]:
    """Write and measure the model, repeatedly if the plan bounds the KL divergence. Return the last measurement.

    Args:
        plan: plan with the target.
        write: function that rounds and writes the model. Its argument is the expected KL divergence, or None if the
            plan has another target.
        measure: function that compares the written model with the original, as `verify` does.
        force: whether to accept a ruined model.

    Raises:
        UsageError: the target ruins the model, or the bound on the KL divergence was not reached.
    """
    expected_kl = None if plan.max_kl is None else plan.max_kl / 2
    n_tries = 0
    while True:
        write(expected_kl)
        fidelity = measure()
        kl = fidelity["mean_kl"]
        above_bound = plan.max_kl is not None and kl > plan.max_kl
        if not kl <= RUINOUS_KL and not force and not above_bound:
            raise UsageError(
                f"this target ruins the model (mean KL {kl:.2f} nats per token, perplexity x {fidelity['ratio']:.2f} "
                f"on {fidelity['text']}): choose a target that changes the model less, or set `force`"
            )
        if expected_kl is None or plan.max_kl is None or not math.isfinite(kl):
            return fidelity
        n_tries += 1
        if kl <= plan.max_kl and (n_tries >= _TRIES or kl >= _CLOSE_ENOUGH * plan.max_kl):
            return fidelity
        if n_tries >= 2 * _TRIES:
            raise UsageError(
                f"`max_kl` is {plan.max_kl}, but the last of {n_tries} tries has a mean KL of {kl:.3g}: give a larger "
                "value"
            )
        expected_kl *= min(0.95 * plan.max_kl / kl, _MAX_FACTOR) if kl else _MAX_FACTOR


def _weight_error(folder: Path, packed: PackedFolder) -> dict[str, Any]:
    """Measure the error of all tensors that rounding changed, `‖after - before‖ / ‖before‖`, as `weight_error`."""
    source = open_as_floats(folder)
    error = size = 0.0
    for name in source.specs:
        before, after = source[name], packed[name]
        if before.is_floating_point() and not torch.equal(before, after):
            error += (after.double() - before.double()).square().sum().item()
            size += before.double().square().sum().item()
    return {"fidelity": LOSSY, "mean_kl": None, "weight_error": math.sqrt(error / size) if size else 0.0}


def _max_positions(folder: Path) -> int:
    """Return the largest number of tokens in an input of a model, or 512 if its config does not name this number."""
    config = open_folder(folder).config
    sizes = [config[key] for key in ("max_position_embeddings", "n_positions") if isinstance(config.get(key), int)]
    return min(sizes, default=512)
