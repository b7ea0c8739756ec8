"""Pack and quantize checkpoints that other tools have quantized.

    python -m benchmarks.quantized_inputs [SCRATCH] [--data DIR] [--formats PART;PART] [--lossless-only]

`tests/quantized_inputs.py` quantizes the linear layers of the demo model in each format, if possible with the package
that defines the format. *Lossless* is the size of these layers after `pack --codec none`, in percent of their size
before. *Weights* and *scales* are the same for the tensors of weights and of scales. *Entropy* is the empirical entropy
of the weights' bytes in percent, a lower bound for codes of single bytes. *KL at 4 bits* is the mean KL divergence of
`quantize` at 4 bits from its input. It is calibrated on WikiText-2's training text, and measured on 8 windows of 512
tokens of the validation text. The input of the last row is the model in 16 bits.
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
from freebits.evaluation.folder_sizes import bits_by_tensor
from freebits.evaluation.verification import compare_models
from freebits.execution.progress import silent
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from freebits.types import bytes_of
from tests.quantized_inputs import MAKERS, save_quantized

HEADER = ("format", "bits per weight", "lossless", "weights", "entropy", "scales", "KL at 4 bits")
SIXTEEN = "float16"


def main() -> None:
    """Measure each format, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", nargs="?", type=Path)
    parser.add_argument("--data", type=Path, help="folder with wikitext-2-raw; not needed with --lossless-only")
    parser.add_argument("--formats", default="")
    parser.add_argument("--lossless-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.lossless_only and not arguments.data:
        parser.error("give --data, or --lossless-only")
    names = () if arguments.lossless_only else ("wikitext2_train.txt", "wiki.valid.raw")
    texts = [(arguments.data / "wikitext-2-raw" / name).read_text(encoding="utf-8")[:300_000] for name in names]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        dense = demo_model()
        for name in (*MAKERS, SIXTEEN):
            if not any(part in name for part in arguments.formats.split(";")):
                continue
            folder = dense
            sizes: tuple[str, ...] = ("16.00", "", "", "", "")
            if name != SIXTEEN:
                folder = scratch / "quantized"
                shutil.rmtree(folder, ignore_errors=True)
                save_quantized(dense, folder, name)
                sizes = lossless(dense, folder, scratch / "packed")
            mean_kl = "" if arguments.lossless_only else f"{lossy(folder, scratch / 'rounded', *texts):.4f}"
            rows.append((name, *sizes, mean_kl))
            print("; ".join(rows[-1]), flush=True)
            save_csv("quantized_inputs", HEADER, rows)
    print_table(HEADER, rows)


def lossless(dense: Path, folder: Path, packed: Path) -> tuple[str, ...]:
    """Return the bits per weight of the input, and the sizes of packed layers in percent."""
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
        layer = name.rpartition(".")[0]
        layer_bytes = sum(other.n_bytes for n, other in source.specs.items() if n.rpartition(".")[0] == layer)
        is_weight = spec.n_bytes >= 0.2 * layer_bytes
        part = "weights" if is_weight else "scales"
        before[part] += spec.n_bytes
        after[part] += bits[name] * spec.numel / 8
        counts += torch.bincount(torch.from_numpy(bytes_of(source[name])).int(), minlength=256) if is_weight else 0
    n_weights = sum(spec.numel for name, spec in plain.items() if name.endswith("proj.weight"))
    shares = [f"{100 * after[part] / max(1, before[part]):.1f} %" for part in ("weights", "scales")]
    total = 100 * sum(after.values()) / sum(before.values())
    width = f"{8 * sum(before.values()) / n_weights:.2f}"
    return width, f"{total:.1f} %", shares[0], f"{100 * entropy(counts) / 8:.1f} %", shares[1]


def entropy(counts: Tensor) -> float:
    """Return the entropy in bits of a byte with these counts of values."""
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log2()).sum())


def lossy(folder: Path, out: Path, text: str, held_out: str) -> float:
    """Quantize to 4 bits, and return the mean KL divergence from the input."""
    shutil.rmtree(out, ignore_errors=True)
    freebits.quantize(folder, out, bits=4, calibration=text, samples=16, trellis=0)
    windows = token_windows(folder, held_out, 512, 8)
    measured: dict[str, Any] = compare_models(folder, out, windows, silent)
    return float(measured["mean_kl"])


if __name__ == "__main__":
    main()
