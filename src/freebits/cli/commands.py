"""One function for each verb: call it and print what it says; returns the exit code."""

import tempfile
from argparse import Namespace
from pathlib import Path

import torch
import transformers

from examples import demo
from freebits.api.compress import compress
from freebits.api.estimate import estimate
from freebits.api.import_slicegpt import import_slicegpt
from freebits.api.lowrank import lowrank
from freebits.api.pack import pack, unpack
from freebits.api.quantize import quantize
from freebits.api.recover import recover
from freebits.api.rotate import rotate_model
from freebits.api.slice import slice_model
from freebits.cli.output import (
    Row,
    announce,
    changes,
    print_components,
    print_facts,
    print_fidelity,
    print_json,
    print_ladder,
    print_plan,
    print_table,
    progress_bar,
)
from freebits.cli.parser import build_parser
from freebits.errors import CheckpointError, UsageError
from freebits.evaluation.inspection import inspect
from freebits.evaluation.perplexity import evaluate
from freebits.evaluation.reporting import write_report
from freebits.evaluation.verification import verify
from freebits.execution.executor import Parallel
from freebits.storage.auxiliary_files import CARD
from freebits.storage.hub import push
from freebits.storage.remote import url_of

OK, FAILED = 0, 1

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def run_demo(arguments: Namespace) -> int:
    """Slice, pack, unpack and measure the demo model."""
    with tempfile.TemporaryDirectory(prefix="freebits-demo-") as scratch:
        directory = arguments.out or Path(scratch)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {directory}: {error.strerror}") from None
        result = demo.run_demo(directory, progress_bar, announce)
    if arguments.json:
        return print_json(result)
    rows: list[Row] = [("stage", "bytes", "vs dense", "vs dense untied", "perplexity", "seconds")]
    for stage in result["stages"]:
        sizes = (f"{stage['bytes']:,}", *changes(stage["bytes"], result["bytes"]))
        rows.append((stage["name"], *sizes, f"{stage['perplexity']:.3f}", f"{stage['seconds']:.1f}"))
    print_table(rows)
    print(f"\nThe canonical model continues: {result['sentence']!r}")
    return OK


def run_compress(arguments: Namespace) -> int:
    """Make a model smaller."""
    if arguments.push_to and url_of(arguments.out):
        raise UsageError("--push-to uploads a folder that lies here: give OUT no address, or push it there")
    result = compress(
        arguments.model,
        arguments.out,
        target_size=arguments.target_size,
        target_ratio=arguments.target_ratio,
        bits=arguments.bits,
        lossless=arguments.lossless,
        max_kl=arguments.max_kl,
        calibration=_text(arguments.calibration),
        text=_text(arguments.text),
        keep=arguments.keep,
        fallback_bits=arguments.fallback_bits,
        revision=arguments.revision,
        device=arguments.device,
        parallel=Parallel(jobs=arguments.jobs),
        force=arguments.force,
        dry_run=arguments.dry_run,
        sign_with=arguments.sign,
        progress=progress_bar("compress"),
    )
    if arguments.push_to and not arguments.dry_run:
        result["pushed"] = push(arguments.out, arguments.push_to)
    if arguments.json:
        return print_json(result)
    if result.get("kind") == "pipeline":
        return print_components(result)
    print_plan(result["plan"])
    if arguments.dry_run:
        return OK
    print_facts(result, as_json=False)
    print_fidelity(result["fidelity"])
    how = (
        f"load it with {result['auto_class']} after `import freebits`"
        if result["auto_class"]
        else "unpack it to load it"
    )
    print(f"{result['seconds']:.0f} s; {how}; see {arguments.out / CARD}")
    return OK


def run_estimate(arguments: Namespace) -> int:
    """Sizes from a config."""
    result = estimate(arguments.config, arguments.sparsity, arguments.revision)
    if arguments.json:
        return print_json(result)
    if arguments.sparsity is None:
        print_ladder(result)
        return OK
    print(f"hidden size {result['hidden_size']:,}, sliced to {result['sliced_size']:,}; bytes in {result['dtype']}")
    rows: list[Row] = [("form", "params", "bytes", "vs dense", "vs dense untied")]
    for form, size in result["bytes"].items():
        if size is not None:
            count = result["params"].get(form)
            name = "as written by default, about" if form == "default" else form.replace("_", " ")
            rows.append((name, "" if count is None else f"{count:,}", f"{size:,}", *changes(size, result["bytes"])))
    print_table(rows)
    return OK


def run_slice(arguments: Namespace) -> int:
    """Slice a dense checkpoint."""
    facts = slice_model(
        arguments.model,
        arguments.out,
        sparsity=arguments.sparsity,
        untie=arguments.untie,
        calibration=_text(arguments.calibration),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        random_orientation=arguments.random_orientation,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        force=arguments.force,
        parallel=_parallel(arguments, jobs=1),
        resume=arguments.resume,
        progress=progress_bar("slice"),
    )
    return print_facts(facts, arguments.json)


def run_pack(arguments: Namespace) -> int:
    """Pack a sliced checkpoint."""
    facts = pack(
        arguments.model,
        arguments.out,
        codec=arguments.codec,
        entropy=arguments.entropy,
        threshold=arguments.threshold,
        device=arguments.device,
        parallel=_parallel(arguments),
        resume=arguments.resume,
        sign_with=arguments.sign,
        progress=progress_bar("pack"),
    )
    return print_facts(facts, arguments.json)


def run_quantize(arguments: Namespace) -> int:
    """Quantise a checkpoint."""
    facts = quantize(
        arguments.model,
        arguments.out,
        bits=arguments.bits,
        target_size=arguments.target_size,
        target_kl=arguments.target_kl,
        method=arguments.method,
        rotate=arguments.rotate,
        only=arguments.only,
        keep=arguments.keep,
        fallback_bits=arguments.fallback_bits,
        calibration=_text(arguments.calibration),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        device=arguments.device,
        parallel=_parallel(arguments),
        resume=arguments.resume,
        sign_with=arguments.sign,
        progress=progress_bar("quantize"),
    )
    return print_facts(facts, arguments.json)


def run_lowrank(arguments: Namespace) -> int:
    """Make layers of a checkpoint narrow."""
    facts = lowrank(
        arguments.model,
        arguments.out,
        budget=arguments.budget,
        target_size=arguments.target_size,
        blocks=arguments.blocks,
        allocate=arguments.allocate,
        calibration=_text(arguments.calibration),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        device=arguments.device,
        parallel=_parallel(arguments, jobs=1),
        resume=arguments.resume,
        sign_with=arguments.sign,
        progress=progress_bar("lowrank"),
    )
    return print_facts(facts, arguments.json)


def run_recover(arguments: Namespace) -> int:
    """Train what a lossy step left."""
    facts = recover(
        arguments.model,
        arguments.out,
        against=arguments.against,
        calibration=_text(arguments.calibration),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        rank=arguments.rank,
        seed=arguments.seed,
        device=arguments.device,
        force=arguments.force,
        sign_with=arguments.sign,
        progress=progress_bar("recover"),
    )
    return print_facts(facts, arguments.json)


def run_rotate(arguments: Namespace) -> int:
    """Rotate a checkpoint."""
    facts = rotate_model(arguments.model, arguments.out, seed=arguments.seed, progress=progress_bar("rotate"))
    return print_facts(facts, arguments.json)


def run_import(arguments: Namespace) -> int:
    """Make a folder of a model that SliceGPT's code sliced."""
    return print_facts(import_slicegpt(arguments.file, arguments.model, arguments.out), arguments.json)


def run_unpack(arguments: Namespace) -> int:
    """Unpack a packed checkpoint."""
    facts = unpack(
        arguments.packed, arguments.out, parallel=Parallel(jobs=arguments.jobs), progress=progress_bar("unpack")
    )
    return print_facts(facts, as_json=True) if arguments.json else OK


def run_inspect(arguments: Namespace) -> int:
    """Say what a folder holds."""
    return print_facts(inspect(arguments.path), arguments.json)


def run_verify(arguments: Namespace) -> int:
    """Check a packed checkpoint."""
    result = verify(
        arguments.packed,
        against=arguments.against,
        text=_text(arguments.text),
        seq_len=arguments.seq_len,
        limit=arguments.limit,
        kl=arguments.kl,
        ratio=arguments.ratio,
        key=arguments.key,
        progress=progress_bar("verify"),
    )
    code = OK if result["ok"] else FAILED
    if arguments.json:
        print_json(result)
        return code
    signed = f"signed by the owner of {arguments.key}; " if arguments.key else ""
    print(f"{signed}every digest matches, everything decodes")
    if result["perplexity"]["packed"] is not None:
        perplexity = result["perplexity"]
        print(f"perplexity        {perplexity['packed']:.4f} packed, {perplexity['reference']:.4f} reference")
        print(f"perplexity ratio  {result['ratio']:.5f}")
        print(f"mean KL           {result['mean_kl']:.2e} nats per token")
        print(f"max |Δlogit|      {result['max_abs_logit_diff']:.3g}")
    if arguments.against:
        verdict = (
            "within the tolerance" if result["ok"] else f"NOT within the tolerance ({', '.join(result['failed'])})"
        )
        print(f"{verdict} of {result['fidelity']} moves")
    return code


def run_eval(arguments: Namespace) -> int:
    """Measure perplexity and zero-shot accuracy."""
    result = evaluate(
        arguments.model,
        text=_text(arguments.text),
        seq_len=arguments.seq_len,
        limit=arguments.limit,
        tasks=[name for name in arguments.tasks.split(",") if name],
        data_dir=arguments.data_dir,
        perplexity=not arguments.no_perplexity,
        activations=arguments.activations,
        kv=arguments.kv,
        rotate=arguments.rotate,
        device=arguments.device,
        progress=progress_bar("measure"),
    )
    if arguments.json:
        return print_json(result)
    if result["perplexity"] is not None:
        print(f"perplexity {result['perplexity']:.4f} on {result['tokens']:,} tokens")
    if result["tasks"]:
        rows: list[Row] = [("task", "metric", "value", "standard error")]
        for task, metrics in result["tasks"].items():
            for metric, value in metrics.items():
                if value is not None and "stderr" not in metric:
                    error = metrics.get(metric.replace(",", "_stderr,") if "," in metric else f"{metric}_stderr")
                    rows.append((task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
        print_table(rows)
    return OK


def run_report(arguments: Namespace) -> int:
    """Write a page that shows a folder."""
    result = write_report(
        arguments.model,
        arguments.output,
        against=arguments.against,
        text=_text(arguments.text),
        seq_len=arguments.seq_len,
        limit=arguments.limit,
        progress=progress_bar("run"),
    )
    if arguments.json:
        return print_json(result)
    print(f"{result['page']}: open it in a browser")
    return OK


def run_completion(arguments: Namespace) -> int:
    """Print what a shell needs to complete commands."""
    try:
        import shtab
    except ImportError:
        raise UsageError("completion takes the package shtab: pip install 'freebits[completion]'") from None
    print(shtab.complete(build_parser(), arguments.shell))
    return OK


def _parallel(arguments: Namespace, jobs: int | None = None) -> Parallel:
    """The parallel options of a command."""
    return Parallel(jobs=jobs or arguments.jobs, backend=arguments.backend, address=arguments.address)


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}): give a plain text file") from None
