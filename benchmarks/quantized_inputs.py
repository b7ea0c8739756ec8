"""Checkpoints that other tools have quantized: what is saved without loss, and what quantizing them costs.

    python -m benchmarks.quantized_inputs [SCRATCH] [--data DIR] [--formats PART;PART] [--lossless-only]

The linear layers of the demo model's blocks are quantized in each format (`tests/quantized_inputs.py`: by the package
that defines the format where there is one). *Lossless* is what `pack --codec none` leaves of the bytes of these layers:
of all, of the weights, of their scales; `entropy` is the empirical entropy of the weights' bytes, in per cent of them,
which no code of single bytes passes. *Lossy*: `quantize` at 4 bits, calibrated on WikiText-2's training text; mean KL
divergence from the model that was read, on 8 x 512 tokens of the validation text; the last row is the model in 16 bits.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import freebits
from benchmarks.results import print_table, save_csv
from examples.demo_model import demo_model
from freebits.calibration.tokens import token_windows
from freebits.evaluation.sizes import bits_by_tensor
from freebits.evaluation.verification import compared
from freebits.packed.reader import PackedFolder
from freebits.storage.folder import Checkpoint
from freebits.types import bytes_of
from tests.quantized_inputs import MAKERS, save_quantized

HEADER = ("format", "bits per weight", "lossless", "weights", "entropy", "scales", "KL at 4 bits")
DATA = Path(__file__).parent.parent.parent / "shared" / "data"
SIXTEEN = "float16"


def main() -> None:
    """Measure each format, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", nargs="?", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--formats", default="")
    parser.add_argument("--lossless-only", action="store_true")
    arguments = parser.parse_args()
    folder_ = arguments.data / "wikitext-2-raw"
    names = ("wikitext2_train.txt", "wiki.valid.raw")
    texts = [(folder_ / name).read_text(encoding="utf-8")[:300_000] for name in names]
    rows = []
    with tempfile.TemporaryDirectory() as made:
        scratch = arguments.scratch or Path(made)
        dense = demo_model()
        for format_ in (*MAKERS, SIXTEEN):
            if not any(part in format_ for part in arguments.formats.split(";")):
                continue
            folder = dense
            sizes: tuple[str, ...] = ("16.00", "", "", "", "")
            if format_ != SIXTEEN:
                folder = scratch / "quantized"
                shutil.rmtree(folder, ignore_errors=True)
                save_quantized(dense, folder, format_)
                sizes = lossless(dense, folder, scratch / "packed")
            cost = "" if arguments.lossless_only else f"{lossy(folder, scratch / 'rounded', *texts):.4f}"
            rows.append((format_, *sizes, cost))
            print("; ".join(rows[-1]), flush=True)
            save_csv("quantized_inputs", HEADER, rows)
    print_table(HEADER, rows)


def lossless(dense: Path, folder: Path, packed: Path) -> tuple[str, ...]:
    """Bits of a weight before, and what is left of the bytes of quantized layers, in per cent."""
    shutil.rmtree(packed, ignore_errors=True)
    freebits.pack(folder, packed, codec="none")
    plain = Checkpoint(dense).specs
    source, stored = Checkpoint(folder), PackedFolder(packed)
    bits = bits_by_tensor(stored)
    before: dict[str, int] = {"weights": 0, "scales": 0}
    after = dict.fromkeys(before, 0.0)
    counts = torch.zeros(256, dtype=torch.int64)
    for name, spec in source.specs.items():
        if plain.get(name) == spec:
            continue
        large = spec.n_bytes >= 0.2 * sum(
            of.n_bytes for n, of in source.specs.items() if n.rpartition(".")[0] == name.rpartition(".")[0]
        )
        part = "weights" if large else "scales"
        before[part] += spec.n_bytes
        after[part] += bits[name] * spec.numel / 8
        counts += torch.bincount(torch.from_numpy(bytes_of(source[name])).int(), minlength=256) if large else 0
    n_weights = sum(of.numel for name, of in plain.items() if name.endswith("proj.weight"))
    left = [f"{100 * after[part] / max(1, before[part]):.1f} %" for part in ("weights", "scales")]
    total = 100 * sum(after.values()) / sum(before.values())
    width = f"{8 * sum(before.values()) / n_weights:.2f}"
    return width, f"{total:.1f} %", left[0], f"{100 * entropy(counts) / 8:.1f} %", left[1]


def entropy(counts: Tensor) -> float:
    """Of bytes that occur so often, in bits."""
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log2()).sum())


def lossy(folder: Path, out: Path, text: str, held_out: str) -> float:
    """The mean KL divergence of the quantized model from the one that was read."""
    shutil.rmtree(out, ignore_errors=True)
    freebits.quantize(folder, out, bits=4, calibration=text, samples=16)
    windows = token_windows(folder, held_out, 512, 8)
    measured: dict[str, Any] = compared(folder, out, windows, lambda *_: None)
    return float(measured["mean_kl"])


if __name__ == "__main__":
    main()
