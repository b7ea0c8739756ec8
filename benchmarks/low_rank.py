"""Compare low-rank layers with slicing and quantization at equal bytes, on the off-grid demo model. One hour.

    python -m benchmarks.low_rank DATA

DATA contains wikitext-2-raw and piqa. All methods calibrate on 32 windows of self-generated data. They are measured on
the first 8 windows of 1024 tokens of WikiText-2's validation text, which is another domain, and on 300 items of PIQA.
Bytes are those of finished folders without the entropy stage. The sparsity of a sliced model is chosen so that its
canonical folder is about as large as that of `slope` at the same budget. Multiplications count the matrices of the
blocks for one token; speed is the median of 5 runs on a prompt of 512 tokens.
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
from benchmarks.quantize import compare
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
    """Convert, measure, print and save."""
    data = Path(sys.argv[1])
    valid = (data / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        dense = off_grid(scratch / "off-grid")
        windows = token_windows(dense, valid, 1024, 8)
        reference = load(dense, dtype=torch.float32).eval()

        def measure(name: str, budget: object, plain: Path, packed: Path) -> int:
            model = load(packed, dtype=torch.float32).eval()
            comparison = compare(reference, model, windows).values()
            tasks = freebits.evaluate(packed, tasks=["piqa"], data_dir=data, limit=300, perplexity=False)
            sizes = [size(folder) for folder in (plain, packed)]
            accuracy = tasks["tasks"]["piqa"]["acc"]
            use_pivots = load(packed, dtype=torch.float32, keep_pivots=True).eval()
            cost = [f"{multiplications(use_pivots) / 1e6:.1f}", f"{speed(use_pivots):.0f}"]
            rows.append((name, budget, *sizes, *comparison, accuracy, *cost))
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
            slope_bytes = 0
            for allocate in ("paper", "slope") if budget != 0.8 else ("paper", "uniform", "slope"):
                name, plain = low_rank(dense, budget, allocate)
                slope_bytes = measure(f"low rank, {allocate}", budget, plain, packed(name, plain))
            name, plain = sliced(sparsity_of(dense, slope_bytes))
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
    """Return the bytes of a folder's weights and metadata on disk."""
    sizes = freebits.inspect(folder)["bytes"]
    return int(sizes["packed"] or sizes["sliced"] or sum(f.stat().st_size for f in folder.glob("*.safetensors")))


def sparsity_of(dense: Path, target: int) -> float:
    """Return the sparsity at which the canonical folder of a sliced model takes about `target` bytes."""
    low, high = 0.0, 0.9
    for _ in range(20):
        middle = (low + high) / 2
        estimated = freebits.estimate(dense, middle)["bytes"]["canonical_tied"]
        low, high = (low, middle) if estimated < target else (middle, high)
    return round(high, 3)


def multiplications(model: Any) -> int:
    """Count the multiplications of one token by the matrices of the blocks."""
    layers = (
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers." in name
    )
    factors = [tensor for name, tensor in model.named_parameters() if name.endswith("_shortcut.factor")]
    pivoted = [tensor for name, tensor in model.named_parameters() if name.endswith(".down.rest")]
    return (
        sum(layer.weight.numel() for layer in layers)
        + sum(2 * factor.numel() for factor in factors)
        + sum(tensor.numel() for tensor in pivoted)
    )


@torch.no_grad()
def speed(model: Any) -> float:
    """Return the tokens per second of a prompt."""
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
