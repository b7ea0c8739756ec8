"""Compare size and fidelity of both codecs on the demo model, without entropy coding. Ten minutes.

A second table compares both codecs at equal bytes.

    python -m benchmarks.canonical
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

import freebits
from benchmarks.results import print_table, save_csv
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text
from freebits.evaluation.folder_sizes import change

SAMPLES = 32
WINDOWS = 16
FORMS = (("float16", True), ("float16", False), ("bfloat16", True), ("float32", True))
"""(dtype, whether the head is untied)."""
HEADER = (
    "dtype", "head", "form", "bytes", "vs dense, %", "vs dense untied, %", "perplexity", "ratio to sliced", "mean KL",
    "max |Δlogit|",
)  # fmt: skip
EQUAL_HEADER = ("form", "sparsity", "width", "bytes", "perplexity")


def sliced(folder: Path, sparsity: float, **options: Any) -> Path:
    """Slice the demo model into a folder, and return the folder."""
    freebits.slice_model(
        demo_model(), folder, sparsity=sparsity, calibration=embedded_text()[0], samples=SAMPLES, **options
    )
    return folder


def fidelity(scratch: Path) -> list[tuple[object, ...]]:
    """Return one row for each form, sliced by 20 %."""
    rows: list[tuple[object, ...]] = []
    for dtype, untie in FORMS:
        name = f"{dtype} {untie}"
        source = sliced(scratch / name, 0.2, untie=untie, dtype=getattr(torch, dtype))
        sizes = freebits.inspect(source)["bytes"]
        head = "untied" if untie else "tied"
        codecs = ("canonical",) if dtype == "float32" else ("bits-back", "canonical")
        measured = []
        for codec in codecs:
            packed = scratch / f"{name} {codec}"
            size = freebits.pack(source, packed, codec=codec, entropy="none")["bytes"]["packed"]
            measured.append((codec, size, freebits.verify(packed, against=source, limit=WINDOWS)))
        reference = measured[0][2]["perplexity"]["reference"]
        entries: list[tuple[Any, ...]] = [("sliced", sizes["sliced"], f"{reference:.3f}", "", "", "")]
        for codec, size, verdict in measured:
            perplexity = verdict["perplexity"]["packed"]
            figures = (f"{perplexity / reference:.5f}", f"{verdict['mean_kl']:.1e}")
            entries.append((codec, size, f"{perplexity:.3f}", *figures, f"{verdict['max_abs_logit_diff']:.3f}"))
        for form, size, *cells in entries:
            changes = (f"{change(size, sizes[base]):+.2f}" for base in ("dense", "dense_untied"))
            rows.append((dtype, head, form, size, *changes, *cells))
            print(rows[-1], flush=True)
    return rows


def equal_bytes(scratch: Path) -> list[tuple[object, ...]]:
    """Compare bits-back at 20 % and 30 % with the widest canonical model that is no larger; heads are untied."""
    rows: list[tuple[object, ...]] = []
    dense = demo_model()
    hidden_size = freebits.estimate(dense, 0.2)["hidden_size"]
    for sparsity in (0.2, 0.3):
        width = freebits.estimate(dense, sparsity)["sliced_size"]
        packed, max_bytes = packed_at(width, "bits-back", hidden_size, scratch)
        rows.append(measured("bits-back", width, hidden_size, packed))
        wider = width + 32
        while estimated_bytes(wider, hidden_size) > 1.005 * max_bytes:  # clearly too large
            wider -= 8
        packed, size = packed_at(wider, "canonical", hidden_size, scratch)
        while size > max_bytes:
            wider -= 8
            packed, size = packed_at(wider, "canonical", hidden_size, scratch)
        rows.append(measured("canonical", wider, hidden_size, packed))
    return rows


def estimated_bytes(width: int, hidden_size: int) -> int:
    """Estimate the bytes of the canonical form in 16-bit values, without headers, for full ranks."""
    n_values: int = freebits.estimate(demo_model(), 1 - width / hidden_size)["params"]["canonical"]
    return 2 * n_values


def packed_at(width: int, codec: str, hidden_size: int, scratch: Path) -> tuple[Path, int]:
    """Slice the demo model to a width and pack it; return the folder and its bytes."""
    source, packed = scratch / f"sliced {width}", scratch / f"{codec} {width}"
    if not source.exists():
        sliced(source, 1 - width / hidden_size, untie=True)
    return packed, freebits.pack(source, packed, codec=codec, entropy="none")["bytes"]["packed"]


def measured(codec: str, width: int, hidden_size: int, packed: Path) -> tuple[object, ...]:
    """Return a row of the comparison at equal bytes."""
    size = freebits.inspect(packed)["bytes"]["packed"]
    perplexity = freebits.evaluate(packed, limit=WINDOWS)["perplexity"]
    row = (codec, f"{1 - width / hidden_size:.4f}", width, size, f"{perplexity:.3f}")
    print(row, flush=True)
    return row


def main() -> None:
    """Measure, print and save both tables."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, header, measure in (
            ("canonical", HEADER, fidelity),
            ("equal_bytes", EQUAL_HEADER, equal_bytes),
        ):
            rows = measure(Path(scratch))
            print_table(header, rows)
            save_csv(name, header, rows)


if __name__ == "__main__":
    main()
