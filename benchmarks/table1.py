"""Reproduce Table 1 of the paper: sizes after SliceGPT and after bits-back, from configs only. Seconds.

python -m benchmarks.table1
"""

from pathlib import Path

import freebits
from benchmarks.results import print_table, save_csv

CONFIGS = Path(__file__).parent / "configs"
PAPER = {
    "opt-1.3b": ((-9.53, -13.77), (-14.84, -18.61), (-20.53, -23.81)),
    "opt-2.7b": ((-9.19, -13.84), (-15.07, -19.09), (-20.88, -24.43)),
    "opt-6.7b": ((-9.29, -14.07), (-15.16, -19.29), (-21.18, -24.84)),
    "opt-13b": ((-9.18, -14.01), (-15.27, -19.51), (-21.29, -24.97)),
    "llama-2-7b": ((-9.38, -14.13), (-15.34, -19.53), (-21.45, -25.09)),
}
"""Size change in percent (after SliceGPT, after bits-back with corrections), at 20, 25 and 30 %."""
HEADER = ("model", "sparsity", "SliceGPT, paper", "SliceGPT", "bits-back, paper", "bits-back", "canonical")


def main() -> None:
    """Compute, print and save the table."""
    rows = []
    for model, columns in PAPER.items():
        for sparsity, (sliced, bits_back) in zip((0.20, 0.25, 0.30), columns, strict=True):
            changes = freebits.estimate(CONFIGS / f"{model}.json", sparsity)["change_vs_dense_untied"]
            figures = (sliced, changes["sliced"], bits_back, changes["bits_back"], changes["canonical"])
            rows.append((model, f"{sparsity:.0%}", *(f"{figure:.2f}" for figure in figures)))
    print_table(HEADER, rows)
    save_csv("table1", HEADER, rows)


if __name__ == "__main__":
    main()
