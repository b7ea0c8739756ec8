"""What recovery makes good: the off-grid demo model at 3 bits, sliced, and with narrow layers. Half an hour.

    python -m benchmarks.recovery WIKITEXT [--samples 128,512]

WIKITEXT is the folder of wikitext-2-raw. Everything is calibrated and trained on text that the dense model writes
itself, and measured on the first 16 windows of 1024 tokens of WikiText-2's validation text, which is another domain.
Bytes are finished folders', those of plain ones packed by default; minutes are the recovery's, its text included.
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
from benchmarks.quantize import compared
from benchmarks.results import print_table, save_csv
from freebits.calibration.tokens import token_windows
from freebits.integrations.loading import load

HEADER = ("model", "windows trained on", "bytes", "perplexity", "ratio", "mean KL", "KL on its own text", "minutes")


def main() -> None:
    """Make, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wikitext", type=Path)
    parser.add_argument("--samples", default="128", help="windows to train on (default: %(default)s)")
    arguments = parser.parse_args()
    valid = (arguments.wikitext / "wiki.valid.raw").read_text(encoding="utf-8")
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        dense = off_grid(scratch / "dense")
        windows = token_windows(dense, valid, 1024, 16)
        reference = load(dense, dtype=torch.float32).eval()

        def measure(name: str, samples: int, folder: Path, kl: float | None, seconds: float) -> None:
            packed = folder
            if freebits.inspect(folder)["kind"] != "packed":
                packed = scratch / f"{folder.name}, packed"
                freebits.pack(folder, packed)
            model: Any = load(folder, dtype=torch.float32).eval()
            own = "" if kl is None else f"{kl:.4f}"
            minutes = f"{seconds / 60:.1f}" if seconds else ""
            found = compared(reference, model, windows).values()
            rows.append((name, samples or "", size(packed), *found, own, minutes))
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
