"""Zero-shot accuracy of the demo model, dense, sliced 20 % on WikiText-2 and packed. An hour and a half on two cores.

    python -m benchmarks.zero_shot DATA_DIR

DATA_DIR has folders piqa, winogrande and hellaswag as `freebits eval --data-dir` wants them, and wikitext-2-raw with
wikitext2_train.txt (its last line is taken to be cut off) and wiki.valid.raw.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import freebits
from benchmarks.results import print_table, save_csv
from freebits.evaluation.tasks import METRICS, prepare, zero_shot
from freebits.huggingface import load
from freebits.huggingface.demo_model import demo_model
from freebits.huggingface.loading import load_tokenizer

THRESHOLDS = (0.01, 0.005)
DOCUMENTS = {"piqa": None, "winogrande": None, "hellaswag": 1000}
WINDOWS = 128
HEADER = ("model", "WikiText-2 perplexity", "task", "documents", *METRICS)


def models(data_dir: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """The dense model and what is made of it."""
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
    """Measure, print and save, after each model what is there."""
    data_dir = Path(sys.argv[1])
    text = (data_dir / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in models(data_dir, Path(scratch)):
            perplexity = freebits.evaluate(path, text=text, limit=WINDOWS)["perplexity"]
            model, tokenizer = load(path, dtype=torch.float32).eval(), load_tokenizer(path)
            for task, limit in DOCUMENTS.items():
                measured = zero_shot(model, tokenizer, prepare([task], data_dir), limit=limit)[task]
                values = (measured[metric] for metric in METRICS)
                cells = ("" if value is None else f"{value:.4f}" for value in values)
                rows.append((name, f"{perplexity:.3f}", task, limit or "all", *cells))
                print(rows[-1], flush=True)
            save_csv("zero_shot", HEADER, rows)
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
