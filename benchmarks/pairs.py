"""Measure what the canonical basis of pairs saves on the dense demo model, in two dtypes.

    python -m benchmarks.pairs

Bytes are those of finished folders without the entropy stage. Perplexity and KL divergence are relative to the dense
model, on pages of Python's documentation. The last columns are the errors of the product of a rounded pair, in the
original basis and in the canonical basis (pivots). The exact matrices are perturbed so that they are not on the grid of
the dtype.
"""

import statistics
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import freebits
from benchmarks.results import print_table, save_csv
from examples.demo_model import demo_model
from freebits.models.architecture import Architecture
from freebits.models.free_bases import find_pairs
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from freebits.transforms.paired import pivoted, product_difference

HEADER = (
    *("dtype", "bytes, codec none", "bytes, canonical", "weights saved", "perplexity ratio", "mean KL"),
    *("max abs Δlogit", "product error, original basis", "product error, pivots"),
)


def main() -> None:
    """Pack, measure, print and save."""
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in (torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            dense, canonical = Path(scratch) / name, Path(scratch) / f"{name} canonical"
            AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype).save_pretrained(dense)
            AutoTokenizer.from_pretrained(demo_model()).save_pretrained(dense)
            plain = freebits.pack(dense, Path(scratch) / f"{name} plain", codec="none", entropy="none")
            packed = freebits.pack(dense, canonical, entropy="none")
            stored = PackedFolder(canonical).stored
            n_stored = sum(spec.numel for key, spec in stored.items() if not key.endswith(".pivots"))
            n_saved = sum(spec.numel for spec in Checkpoint(dense).specs.values()) - n_stored
            verdict = freebits.verify(canonical, against=dense)
            fidelity = f"{verdict['ratio']:.5f}", f"{verdict['mean_kl']:.1e}", f"{verdict['max_abs_logit_diff']:.3f}"
            sizes = plain["bytes"]["packed"], packed["bytes"]["packed"], n_saved
            rows.append((name, *sizes, *fidelity, *product_errors(dense, dtype)))
            print(rows[-1], flush=True)
    print_table(HEADER, rows)
    save_csv("pairs", HEADER, rows)


def product_errors(dense: Path, dtype: torch.dtype) -> tuple[str, str]:
    """Return the median error of a pair's product after rounding, in the original and in the canonical basis."""
    checkpoint = Checkpoint(dense)
    architecture = Architecture.of(checkpoint.config)
    shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
    generator = torch.Generator().manual_seed(0)
    errors: tuple[list[float], list[float]] = [], []
    for pair in (pair for part in architecture.parts for pair in find_pairs(architecture, part, shapes, dense=True)):
        exact = {}
        for name in pair.names:
            factors = 1 + 0.02 * torch.rand(shapes[name], generator=generator, dtype=torch.float64)
            exact[name] = checkpoint[name].double() * factors
        for values, matrices in zip(errors, (exact, pivoted(exact, pair)), strict=True):
            if matrices is not None:
                rounded = {name: tensor.to(dtype) for name, tensor in matrices.items()}
                values.append(product_difference(exact, rounded, pair))
    original, pivots = (f"{statistics.median(values):.1e}" for values in errors)
    return original, pivots


if __name__ == "__main__":
    main()
