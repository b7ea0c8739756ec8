"""Measure `recover` on the off-grid demo model: quantized to 3 bits, sliced, and low-rank. Half an hour.

    python -m benchmarks.recovery WIKITEXT [--samples 128,512]

WIKITEXT is the folder wikitext-2-raw. Calibration and training use self-generated data of the dense model. All models
are measured on the first 16 windows of 1024 tokens of WikiText-2's validation text, which is another domain. Bytes are
those of packed folders. Minutes are those of `recover`, including the generation of its data.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import freebits
from benchmarks.low_rank import size
from benchmarks.off_grid import off_grid
from benchmarks.quantize import compare
from benchmarks.results import print_table, save_csv
from freebits.calibration.tokens import token_windows
from freebits.integrations.loading import load

HEADER = (
    "model",
    "windows trained on",
    "bytes",
    "perplexity",
    "ratio",
    "mean KL",
    "KL on self-generated data",
    "minutes",
)


def main() -> None:
    """Convert, recover, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wikitext", type=Path)
    parser.add_argument("--samples", default="128", help="windows to train on (default: %(default)s)")
    arguments = parser.parse_args()
    valid = (arguments.wikitext / "wiki.valid.raw").read_text(encoding="utf-8")
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        dense = off_grid(scratch / "dense")
        windows = token_windows(dense, valid, 1024, 16)
        reference = load(dense, dtype=torch.float32).eval()

        def measure(name: str, samples: int, folder: Path, kl: float | None, seconds: float) -> None:
            packed = folder
            if freebits.inspect(folder)["kind"] != "packed":
                packed = scratch / f"{folder.name}, packed"
                freebits.pack(folder, packed)
            model: Any = load(folder, dtype=torch.float32).eval()
            self_generated_kl = "" if kl is None else f"{kl:.4f}"
            minutes = f"{seconds / 60:.1f}" if seconds else ""
            comparison = compare(reference, model, windows).values()
            rows.append((name, samples or "", size(packed), *comparison, self_generated_kl, minutes))
            print(rows[-1], flush=True)
            save_csv("recovery", HEADER, rows)

        freebits.quantize(dense, scratch / "3 bits", bits=3)
        freebits.slice_model(dense, scratch / "sliced by 20 %", sparsity=0.2, samples=32, force=True)
        freebits.lowrank(dense, scratch / "low rank, 0.8", budget=0.8, samples=32)
        for name in ("3 bits", "sliced by 20 %", "low rank, 0.8"):
            measure(name, 0, scratch / name, None, 0.0)
            for samples in map(int, arguments.samples.split(",")):
                out, start = scratch / f"{name}, recovered, {samples}", time.perf_counter()
                kl = freebits.recover(scratch / name, out, against=dense, samples=samples)["kl"]
                seconds = time.perf_counter() - start
                measure(f"{name}, recovered", samples, out, kl["after"], seconds)
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
