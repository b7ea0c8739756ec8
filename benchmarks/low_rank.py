"""Narrow layers beside narrow streams and beside rounding, at equal bytes: the off-grid demo model. An hour.

    python -m benchmarks.low_rank DATA

DATA has wikitext-2-raw and piqa. Everything is calibrated on 32 windows of text that the model writes itself, and
measured on the first 8 windows of 1024 tokens of WikiText-2's validation text, which is another domain, and on 300
items of PIQA. Bytes are finished folders' without the entropy stage, so that they say what the form saves. Slices are
of the sparsity whose canonical folder is next to that of `slope` at the same budget. Multiplications are those of the
blocks' matrices for a token; speed is a prompt of 512 tokens, median of 5.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import freebits
from benchmarks.off_grid import off_grid
from benchmarks.quantize import compared
from benchmarks.results import print_table, save_csv
from freebits.calibration.tokens import token_windows
from freebits.integrations.loading import load

HEADER = (
    *("model", "budget", "bytes, plain", "bytes, canonical", "perplexity", "ratio", "mean KL", "PIQA acc"),
    *("million multiplications", "tokens/s"),
)
OPTIONS: dict[str, Any] = {"samples": 32}
BUDGETS = (0.9, 0.8, 0.5)
BITS = 4


def main() -> None:
    """Make, measure, print and save."""
    data = Path(sys.argv[1])
    valid = (data / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        dense = off_grid(scratch / "off-grid")
        windows = token_windows(dense, valid, 1024, 8)
        reference = load(dense, dtype=torch.float32).eval()

        def measure(name: str, budget: object, plain: Path, packed: Path) -> int:
            model = load(packed, dtype=torch.float32).eval()
            found = compared(reference, model, windows).values()
            tasks = freebits.evaluate(packed, tasks=["piqa"], data_dir=data, limit=300, perplexity=False)
            sizes = [size(folder) for folder in (plain, packed)]
            figures = [*found, tasks["tasks"]["piqa"]["acc"]]
            with_pivots = load(packed, dtype=torch.float32, keep_pivots=True).eval()
            work = [f"{multiplications(with_pivots) / 1e6:.1f}", f"{speed(with_pivots):.0f}"]
            rows.append((name, budget, *sizes, *figures, *work))
            print(rows[-1], flush=True)
            save_csv("low_rank", HEADER, rows)
            return sizes[1]

        def packed(name: str, plain: Path) -> Path:
            freebits.pack(plain, scratch / f"{name}, packed", entropy="none")
            return scratch / f"{name}, packed"

        def low_rank(source: Path, budget: float, allocate: str) -> tuple[str, Path]:
            name = f"low rank, {allocate}, {budget} of {source.name}"
            freebits.lowrank(source, scratch / name, budget=budget, allocate=allocate, **OPTIONS)
            return name, scratch / name

        def sliced(sparsity: float) -> tuple[str, Path]:
            name = f"sliced by {sparsity:.3f}"
            if not (scratch / name).exists():
                freebits.slice_model(dense, scratch / name, sparsity=sparsity, samples=32, seq_len=512, force=True)
            return name, scratch / name

        measure("dense", 1, dense, packed("dense", dense))
        for budget in BUDGETS:
            bytes_ = 0
            for allocate in ("paper", "slope") if budget != 0.8 else ("paper", "uniform", "slope"):
                name, plain = low_rank(dense, budget, allocate)
                bytes_ = measure(f"low rank, {allocate}", budget, plain, packed(name, plain))
            name, plain = sliced(sparsity_of(dense, bytes_))
            measure(name, budget, plain, packed(name, plain))
            if budget == 0.8:
                name, plain = sliced(0.05)
                name, plain = low_rank(plain, 0.9, "slope")
                measure("sliced by 0.050, then low rank, slope, 0.9", budget, plain, packed(name, plain))
        for name, source in (
            ("dense", dense),
            ("low rank, slope, 0.8", scratch / "low rank, slope, 0.8 of off-grid"),
            ("low rank, slope, 0.9", scratch / "low rank, slope, 0.9 of off-grid"),
        ):
            out = scratch / f"{name}, {BITS} bits"
            freebits.quantize(source, out, bits=BITS)
            measure(f"{name}, {BITS} bits", "", out, out)
        sizes = [int(str(row[3])) for row in rows[-2:]]
        for target in sizes:
            out = scratch / f"dense, {target}"
            freebits.quantize(dense, out, target_size=target)
            measure("dense, rounded to as many bytes", "", out, out)
    print_table(HEADER, rows)


def size(folder: Path) -> int:
    """Bytes on disk."""
    sizes = freebits.inspect(folder)["bytes"]
    return int(sizes["packed"] or sizes["sliced"] or sum(f.stat().st_size for f in folder.glob("*.safetensors")))


def sparsity_of(dense: Path, target: int) -> float:
    """With which the canonical folder of a slice takes about so many bytes."""
    low, high = 0.0, 0.9
    for _ in range(20):
        middle = (low + high) / 2
        of = freebits.estimate(dense, middle)["bytes"]["canonical_tied"]
        low, high = (low, middle) if of < target else (middle, high)
    return round(high, 3)


def multiplications(model: Any) -> int:
    """Of a token, by the matrices of the blocks."""
    layers = (
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers." in name
    )
    factors = [of for name, of in model.named_parameters() if name.endswith("_shortcut.factor")]
    pivoted = [of for name, of in model.named_parameters() if name.endswith(".down.rest")]
    return (
        sum(layer.weight.numel() for layer in layers)
        + sum(2 * of.numel() for of in factors)
        + sum(of.numel() for of in pivoted)
    )


@torch.no_grad()
def speed(model: Any) -> float:
    """Tokens a second of a prompt."""
    prompt = torch.arange(512)[None]
    run: Callable[[], Any] = lambda: model(input_ids=prompt, use_cache=False)  # noqa: E731
    run()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 512 / statistics.median(seconds)


if __name__ == "__main__":
    main()
