"""Reproduce Figure 2 of the paper: errors of decoded weights without corrections. One minute.

Measured on W_o of the last block of the demo model, sliced by 20 %, and on the values that the rotation of W_o's site
encodes.

    python -m benchmarks.figure2
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import freebits
from benchmarks.results import RESULTS, save_csv
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text
from freebits.codecs.rotation_values import n_values_taken
from freebits.packed.reader import PackedFolder

QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)


def errors(sliced: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return absolute errors of one site: of its output matrix, and of the values that its rotation encodes."""
    # At threshold 0, encoding saves nothing, so every site is rotated but not encoded: these are the true values.
    freebits.pack(sliced, folder / "true", codec="bits-back", entropy="none", threshold=0)
    freebits.pack(sliced, folder / "raw", codec="bits-back", entropy="none", threshold=1e9)  # nothing is corrected
    true, raw = (PackedFolder(folder / name) for name in ("true", "raw"))
    recipe = raw.manifest.recipes[-2]
    [decoded] = raw.decoded(recipe.makes)
    error = {name: (tensor.double() - true[name].double()).abs().flatten() for name, tensor in decoded.items()}
    *message, output = recipe.makes
    values = torch.cat([error[name] for name in message])[-n_values_taken(recipe.params["rank"]) :]
    return {f"W_o of {output}": error[output], "values encoded in its rotation": values}


def main() -> None:
    """Measure, draw the figure, and save quantiles of the errors."""
    with tempfile.TemporaryDirectory() as scratch:
        sliced = Path(scratch) / "sliced"
        freebits.slice_model(demo_model(), sliced, sparsity=0.2, calibration=embedded_text()[0], untie=True, samples=32)
        measured = errors(sliced, Path(scratch))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, values in measured.items():
        left.hist(values.clamp(max=0.02), bins=80, log=True, histtype="step", label=name)
        right.plot(values.sort().values, torch.linspace(0, 1, len(values)), label=name)
    left.set(xlabel="absolute error (the last bin holds all above 0.02)", ylabel="weights")
    right.set(
        xlabel="absolute error",
        ylabel="fraction of weights below",
        xlim=(0, 0.02),
        ylim=(0.9, 1.001),
        xticks=(0, 0.005, 0.01, 0.015, 0.02),
    )
    right.axvline(0.01, color="grey", linestyle=":")
    left.legend(fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "figure2.png", dpi=140)
    rows = [
        (name, *(f"{q:.3e}" for q in (values.mean(), *values.quantile(torch.tensor(QUANTILES, dtype=values.dtype)))))
        for name, values in measured.items()
    ]
    save_csv("figure2", ("tensor", "mean", *(f"{100 * q:g} %" for q in QUANTILES)), rows)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
