"""Reproduce Figure 3 of the paper: size and perplexity against the correction threshold. Five minutes.

The model is the demo model, sliced by 20 %.

    python -m benchmarks.figure3
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import freebits
from benchmarks.results import RESULTS, print_table, save_csv
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text
from freebits.evaluation.folder_sizes import change

THRESHOLDS = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
WINDOWS = 16
HEADER = ("threshold", "bytes", "corrections", "vs dense untied", "perplexity")


def main() -> None:
    """Measure, print, save and draw."""
    with tempfile.TemporaryDirectory() as scratch:
        sliced = Path(scratch) / "sliced"
        sizes = freebits.slice_model(
            demo_model(), sliced, sparsity=0.2, calibration=embedded_text()[0], untie=True, samples=32
        )["bytes"]
        measured = [("sliced", sizes["sliced"], 0, freebits.evaluate(sliced, limit=WINDOWS)["perplexity"])]
        for threshold in THRESHOLDS:
            packed = Path(scratch) / f"packed {threshold}"
            size = freebits.pack(sliced, packed, codec="bits-back", entropy="none", threshold=threshold)["bytes"]
            perplexity = freebits.evaluate(packed, limit=WINDOWS)["perplexity"]
            measured.append((str(threshold), size["packed"], size["corrections"], perplexity))
    changes = [change(n_bytes, sizes["dense_untied"]) or 0.0 for _, n_bytes, _, _ in measured]
    rows = [
        (name, n_bytes, corrections, f"{percent:.3f}", f"{perplexity:.4f}")
        for (name, n_bytes, corrections, perplexity), percent in zip(measured, changes, strict=True)
    ]
    print_table(HEADER, rows)
    save_csv("figure3", HEADER, rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, values, label in (
        (left, changes, "size vs dense untied, %"),
        (right, [perplexity for *_, perplexity in measured], "perplexity, held-out text"),
    ):
        axes.semilogx(THRESHOLDS, values[1:], marker="o", label="bits-back")
        axes.axhline(values[0], color="grey", linestyle="--", label="sliced, without bits-back")
        axes.invert_xaxis()
        axes.set(xlabel="threshold", ylabel=label)
    left.legend(fontsize=8)
    figure.savefig(RESULTS / "figure3.png", dpi=140)


if __name__ == "__main__":
    main()
