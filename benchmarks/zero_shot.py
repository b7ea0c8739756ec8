"""Measure the zero-shot accuracy of the demo model and of compressed versions of it.

    python -m benchmarks.zero_shot DATA_DIR [GGML]

Without GGML, this script measures the demo model, the model sliced by 20 % on WikiText-2, and packed models (90 minutes
on two cores).
With GGML, ggml's shared library `libggml-base.so`, it measures the off-grid demo model, quantized by freebits and with
llama.cpp's K types at their nominal bits (see `benchmarks.nominal_types`), on fewer documents (60 minutes).

DATA_DIR contains the folders piqa, winogrande and hellaswag, as `freebits eval --data-dir` expects them, and
wikitext-2-raw with wikitext2_train.txt, whose incomplete last line is dropped, and wiki.valid.raw.
"""

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import freebits
from benchmarks.nominal_types import Ggml, mean_squares, quantize
from benchmarks.off_grid import off_grid
from benchmarks.results import print_table, save_csv
from examples.demo_model import demo_model
from freebits.calibration.tokens import token_windows
from freebits.evaluation.folder_sizes import bytes_on_disk
from freebits.evaluation.zero_shot_tasks import METRICS, prepare, zero_shot
from freebits.integrations.loading import load, load_tokenizer
from freebits.packed.reader import PackedFolder

THRESHOLDS = (0.01, 0.005)
BITS = (4.0, 3.0, 2.5)
MIXES = ("Q4_K_M", "Q3_K_M")
DOCUMENTS: dict[str, dict[str, int | None]] = {
    "sliced": {"piqa": None, "winogrande": None, "hellaswag": 1000},
    "quantized": {"piqa": 500, "winogrande": 500, "hellaswag": 500},
}
WINDOWS = 128
HEADER = ("model", "WikiText-2 perplexity", "task", "documents", *METRICS)


def quantized(data_dir: Path, scratch: Path, library: Path) -> Iterator[tuple[str, Path]]:
    """Yield the off-grid model, then its versions quantized by freebits and by llama.cpp with importances."""
    path = off_grid(scratch / "off-grid")
    yield "dense", path
    for bits in BITS:
        out = scratch / f"freebits {bits:g}"
        freebits.quantize(path, out, bits=bits)
        yield f"freebits, {bits:g} bits, {bytes_on_disk(PackedFolder(out))} bytes", out
    dense, model = (load(path, dtype=torch.float32).eval() for _ in range(2))
    importances = mean_squares(dense, token_windows(path, training_text(data_dir), 512, 100))
    for mix in MIXES:
        bits, n_bytes = quantize(model, dense, Ggml(library), mix, importances)
        model.save_pretrained(scratch / mix)
        load_tokenizer(path).save_pretrained(scratch / mix)
        yield f"{mix} with importances, {bits:.2f} bits, {n_bytes} bytes", scratch / mix


def sliced_and_packed(data_dir: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield the demo model, the sliced model, then packed models."""
    yield "dense", demo_model()
    text, sliced = training_text(data_dir), scratch / "sliced"
    freebits.slice_model(demo_model(), sliced, sparsity=0.2, untie=True, calibration=text, samples=128, seq_len=1024)
    yield "sliced 20 %", sliced
    for threshold in THRESHOLDS:
        packed = scratch / f"packed at {threshold}"
        freebits.pack(sliced, packed, codec="bits-back", entropy="none", threshold=threshold)
        yield packed.name, packed


def training_text(data_dir: Path) -> str:
    """Return WikiText-2's training text without its incomplete last line."""
    text = (data_dir / "wikitext-2-raw" / "wikitext2_train.txt").read_text(encoding="utf-8")
    return text[: text.rindex("\n")]


def main() -> None:
    """Measure and print; save after each model."""
    data_dir, libraries = Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]]
    which = "quantized" if libraries else "sliced"
    models = partial(quantized, library=libraries[0]) if libraries else sliced_and_packed
    text = (data_dir / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in models(data_dir, Path(scratch)):
            perplexity = freebits.evaluate(path, text=text, limit=WINDOWS)["perplexity"]
            model, tokenizer = load(path, dtype=torch.float32).eval(), load_tokenizer(path)
            for task, limit in DOCUMENTS[which].items():
                measured = zero_shot(model, tokenizer, prepare([task], data_dir), limit=limit)[task]
                values = (measured[metric] for metric in METRICS)
                cells = ("" if value is None else f"{value:.4f}" for value in values)
                rows.append((name, f"{perplexity:.3f}", task, limit or "all", *cells))
                print(rows[-1], flush=True)
            save_csv("zero_shot" if which == "sliced" else "zero_shot_quantized", HEADER, rows)
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
