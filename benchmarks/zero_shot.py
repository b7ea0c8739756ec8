"""Measure the zero-shot accuracy of the demo model and of compressed versions of it.

    python -m benchmarks.zero_shot DATA_DIR [sliced | quantized]

`sliced` measures the demo model, the model sliced by 20 % on WikiText-2, and packed models (90 minutes on two cores).
`quantized` measures the off-grid demo model and its versions of three sizes, on fewer documents (30 minutes).

DATA_DIR contains the folders piqa, winogrande and hellaswag, as `freebits eval --data-dir` expects them, and
wikitext-2-raw with wikitext2_train.txt, whose incomplete last line is dropped, and wiki.valid.raw.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import freebits
from benchmarks.off_grid import off_grid
from benchmarks.results import print_table, save_csv
from examples.demo_model import demo_model
from freebits.evaluation.zero_shot_tasks import METRICS, prepare, zero_shot
from freebits.integrations.loading import load, load_tokenizer

THRESHOLDS = (0.01, 0.005)
SIZES = (90, 68, 60)
DOCUMENTS: dict[str, dict[str, int | None]] = {
    "sliced": {"piqa": None, "winogrande": None, "hellaswag": 1000},
    "quantized": {"piqa": 600, "winogrande": 600, "hellaswag": 300},
}
WINDOWS = 128
HEADER = ("model", "WikiText-2 perplexity", "task", "documents", *METRICS)


def quantized(_: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield the off-grid model, then its versions quantized to three sizes."""
    dense = off_grid(scratch / "off-grid")
    yield "dense", dense
    for size in SIZES:
        out = scratch / f"{size} MB"
        freebits.quantize(dense, out, target_size=size * 1_000_000)
        yield out.name, out


def sliced_and_packed(data_dir: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield the demo model, the sliced model, then packed models."""
    yield "dense", demo_model()
    text = (data_dir / "wikitext-2-raw" / "wikitext2_train.txt").read_text(encoding="utf-8")
    sliced = scratch / "sliced"
    calibration = text[: text.rindex("\n")]
    freebits.slice_model(
        demo_model(), sliced, sparsity=0.2, untie=True, calibration=calibration, samples=128, seq_len=1024
    )
    yield "sliced 20 %", sliced
    for threshold in THRESHOLDS:
        packed = scratch / f"packed at {threshold}"
        freebits.pack(sliced, packed, codec="bits-back", entropy="none", threshold=threshold)
        yield packed.name, packed


def main() -> None:
    """Measure and print; save after each model."""
    data_dir, which = Path(sys.argv[1]), (sys.argv[2:] or ["sliced"])[0]
    models = {"sliced": sliced_and_packed, "quantized": quantized}[which]
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
