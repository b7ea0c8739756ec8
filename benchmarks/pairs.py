"""What the basis of each head wastes: the dense demo model, off the grid of its dtype or on it, in two dtypes.

    python -m benchmarks.pairs

Bytes are finished folders' without the entropy stage; perplexity and KL divergence are against the folder that was
packed, on pages of Python's documentation. The product of a pair is compared on random vectors with that of its exact
matrices, which are moved off the grid for it: in the basis they have, and in pivots.
"""

import statistics
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import freebits
from benchmarks.results import print_table, save_csv
from examples.demo_model import demo_model
from freebits.models.pairs import pairs_of
from freebits.models.table import Architecture
from freebits.packed.reader import PackedFolder
from freebits.storage.folder import Checkpoint
from freebits.transforms.paired import pivoted, product_difference

HEADER = (
    *(
        "dtype",
        "bytes, codec none",
        "bytes, canonical",
        "numbers less",
        "perplexity ratio",
        "mean KL",
        "max abs Δlogit",
    ),
    *("product, own basis", "product, pivots"),
)


def main() -> None:
    """Pack, measure, print and save."""
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as made:
        for dtype in (torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            dense = Path(made) / name
            AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype).save_pretrained(dense)
            AutoTokenizer.from_pretrained(demo_model()).save_pretrained(dense)
            plain = freebits.pack(dense, Path(made) / f"{name} plain", codec="none", entropy="none")
            packed = freebits.pack(dense, Path(made) / f"{name} canonical", entropy="none")
            stored = PackedFolder(Path(made) / f"{name} canonical").stored
            words = sum(spec.numel for key, spec in stored.items() if not key.endswith(".pivots"))
            fewer = sum(spec.numel for spec in Checkpoint(dense).specs.values()) - words
            found = freebits.verify(Path(made) / f"{name} canonical", against=dense)
            told = f"{found['ratio']:.5f}", f"{found['mean_kl']:.1e}", f"{found['max_abs_logit_diff']:.3f}"
            sizes = plain["bytes"]["packed"], packed["bytes"]["packed"], fewer
            rows.append((name, *sizes, *told, *products(dense, dtype)))
            print(rows[-1], flush=True)
    print_table(HEADER, rows)
    save_csv("pairs", HEADER, rows)


def products(dense: Path, dtype: torch.dtype) -> tuple[str, str]:
    """By how much a pair's product misses once it is rounded, in its own basis and in pivots; medians."""
    checkpoint = Checkpoint(dense)
    architecture = Architecture.of(checkpoint.config)
    shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
    generator = torch.Generator().manual_seed(0)
    found: tuple[list[float], list[float]] = [], []
    for pair in (pair for part in architecture.parts for pair in pairs_of(architecture, part, shapes, dense=True)):
        exact = {}
        for name in pair.names:
            off = 1 + 0.02 * torch.rand(shapes[name], generator=generator, dtype=torch.float64)
            exact[name] = checkpoint[name].double() * off
        for forms, form in zip(found, (exact, pivoted(exact, pair)), strict=True):
            if form is not None:
                rounded = {name: tensor.to(dtype) for name, tensor in form.items()}
                forms.append(product_difference(exact, rounded, pair))
    own, pivots = (f"{statistics.median(forms):.1e}" for forms in found)
    return own, pivots


if __name__ == "__main__":
    main()
