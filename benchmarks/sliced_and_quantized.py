"""Measure the off-grid demo model sliced, then quantized. Twenty minutes.

`benchmarks.quantize` measures the dense model quantized to the same bytes.

    python -m benchmarks.sliced_and_quantized DATA

DATA contains wikitext-2-raw. Slicing is calibrated on its training text. This favors slicing, because the measurement
uses the same domain. Quantizing is calibrated on self-generated data. All models are measured on the first 16 windows
of 1024 tokens of the validation text.
"""

import sys
import tempfile
from pathlib import Path

import torch

import freebits
from benchmarks.off_grid import off_grid
from benchmarks.quantize import MB, WINDOWS, compare
from benchmarks.results import print_table, save_csv
from freebits.calibration.tokens import token_windows
from freebits.integrations.loading import load

HEADER = ("sliced", "MB", "bytes", "perplexity", "ratio", "mean KL")
SPARSITIES, SIZES = (0.1, 0.2), (52,)


def main() -> None:
    """Convert, measure, print and save."""
    folder = Path(sys.argv[1]) / "wikitext-2-raw"
    train, valid = ((folder / name).read_text(encoding="utf-8") for name in ("wikitext2_train.txt", "wiki.valid.raw"))
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        dense = off_grid(scratch / "off-grid")
        windows = token_windows(dense, valid, 1024, WINDOWS)
        reference = load(dense, dtype=torch.float32).eval()
        sources: dict[str, Path] = {}
        for sparsity in SPARSITIES:
            sliced = scratch / f"sliced {sparsity}"
            text = train[: train.rindex("\n")]
            freebits.slice_model(dense, sliced, sparsity=sparsity, calibration=text, samples=64, force=True)
            sources[f"{sparsity:.0%}"] = scratch / f"canonical {sparsity}"
            freebits.pack(sliced, sources[f"{sparsity:.0%}"])
        for name, source in sources.items():
            for size in (0, *SIZES):
                out = scratch / f"{name} {size}" if size else source
                if size:
                    freebits.quantize(source, out, target_size=size * MB)
                sizes = freebits.inspect(out)["bytes"]
                comparison = compare(reference, load(out, dtype=torch.float32).eval(), windows).values()
                rows.append((name, size or "16 bits", sizes["packed"] or sizes["dense"], *comparison))
                print(rows[-1], flush=True)
                save_csv("sliced_and_quantized", HEADER, rows)
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
