"""Measure perplexity with rounded activations and KV cache (simulated QuaRot), with and without rotation. 12 minutes.

    python -m benchmarks.coarse DATA [QUANTIZED]

The text is the first 6 windows of 1024 tokens of DATA/wikitext-2-raw/wiki.valid.raw. The model is the off-grid demo
model. QUANTIZED is a folder with the same model quantized to 4 bits.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import freebits
from benchmarks.off_grid import off_grid
from benchmarks.results import print_table, save_csv

HEADER = ("weights", "activations", "KV cache", "not rotated", "rotated")
SETTINGS = ((None, None), (8, None), (6, None), (4, None), (None, 4), (4, 4))


def main() -> None:
    """Measure, print and save perplexities relative to the dense model's."""
    text = (Path(sys.argv[1]) / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as scratch:
        dense = off_grid(Path(scratch) / "off-grid")
        models = {"16 bits": dense, **({"4 bits": Path(sys.argv[2])} if len(sys.argv) > 2 else {})}

        def perplexity(model: Path, activations: int | None, kv: int | None, rotate: str) -> float:
            options: dict[str, Any] = {"activations": activations, "kv": kv, "rotate": rotate}
            measured: float = freebits.evaluate(model, text=text, seq_len=1024, limit=6, **options)["perplexity"]
            return measured

        exact = perplexity(dense, None, None, "none")
        for name, model in models.items():
            for activations, kv in SETTINGS:
                if (activations, kv) != (None, None) or model is not dense:
                    rotations = ("none", "hadamard") if activations or kv else ("none",)
                    ratios = [f"{perplexity(model, activations, kv, rotate) / exact:.3f}" for rotate in rotations]
                    bits = (str(value) if value else "floats" for value in (activations, kv))
                    rows.append((name, *bits, *ratios, *[""] * (2 - len(ratios))))
                    print(rows[-1], flush=True)
                    save_csv("coarse", HEADER, rows)
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
