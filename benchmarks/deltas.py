"""Measure packing with a base on the models that `finetunes` makes.

    python -m benchmarks.deltas FINETUNES SCRATCH [--data DIR] [--rounds N]

Without --data, models are packed bit for bit. The table has the bytes of the folder: original, packed with codec
`none`, and packed with the base. For comparison, it has the bytes of all tensors as XOR with the base, coded by ZipNN
(if it is installed) or by zstd on byte planes, and as ordered differences on byte planes. Rates are bytes of the model
per second of processor time on one thread. With --data, models are quantized with and without their base. Calibration
text is Python's documentation. The KL divergence from the fine-tuned model is measured on WikiText-2.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import freebits
from benchmarks.results import print_table, save_csv
from freebits.calibration.tokens import embedded_text, token_windows
from freebits.codecs.entropy import compress
from freebits.evaluation.folder_sizes import bytes_on_disk
from freebits.evaluation.verification import compare_models
from freebits.execution.executor import Parallel
from freebits.execution.progress import silent
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Checkpoint
from freebits.types import TensorSpec, bytes_of

EXACT = (
    "model",
    "base",
    "bytes",
    "codec none",
    "with the base",
    "of the bytes",
    "bits per weight",
    "XOR, ZipNN",
    "XOR, planes",
    "differences, planes",
    "pack, MB/s",
    "unpack, MB/s",
    "copy, MB/s",
    "all files equal",
)
LOSSY = ("model", "base", "bits per weight", "bytes", "mean KL", "perplexity ratio")
PAIRS = {
    "slow-200": "base",
    "slow-1000": "base",
    "fast-200": "base",
    "fast-1000": "base",
    "fast-1000 ": "fast-900",
    "merge": "base",
    "lora": "base",
    "rows": "base",
}
"""Model → base. A space distinguishes two rows for the same model."""
FORMS = (("base", 0.5), ("base", 1.0), ("base", 2.0), ("base", 3.0), ("", 2.0), ("", 3.0), ("", 4.0))


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("finetunes", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, help="folder with wikitext-2-raw: measure quantization instead")
    parser.add_argument("--models", default="slow-1000; fast-1000", help="models to quantize (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[tuple[Any, ...]] = []
    if arguments.data is None:
        for name, base in PAIRS.items():
            rows.append(exact(arguments.finetunes, name, base, arguments.scratch, arguments.rounds))
            print(rows[-1], flush=True)
            save_csv("deltas", EXACT, rows)
        rows.append(series(arguments.finetunes, arguments.scratch))
        save_csv("deltas", EXACT, rows)
        print_table(EXACT, rows)
        return
    torch.set_num_threads(2)
    text = (arguments.data / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")[:100_000]
    for name in (name.strip() for name in arguments.models.split(";")):
        windows = token_windows(arguments.finetunes / name, text, 512, 8)
        unchanged = distance(arguments.finetunes / name, arguments.finetunes / "base", windows)
        rows.append((name, "(the base itself)", "", "", *unchanged))
        for base, bits in FORMS:
            rows.append(lossy(arguments.finetunes, name, base, bits, windows, arguments.scratch / "quantized"))
            print(rows[-1], flush=True)
            save_csv("lossy_deltas", LOSSY, rows)
    print_table(LOSSY, rows)


def exact(finetunes: Path, name: str, base_name: str, scratch: Path, rounds: int) -> tuple[Any, ...]:
    """Pack one model in several forms. Return a row of the table."""
    model, base = finetunes / name.strip(), finetunes / base_name
    packed, plain, alone = (scratch / folder for folder in ("packed", "plain", "alone"))
    one_job = Parallel(jobs=1)

    def fresh(folder: Path, make: Callable[[Path], object]) -> Callable[[], object]:
        def run() -> object:
            shutil.rmtree(folder, ignore_errors=True)
            return make(folder)

        return run

    steps = {
        "pack": fresh(packed, lambda out: freebits.pack(model, out, base=base, parallel=one_job)),
        "unpack": fresh(plain, lambda out: freebits.unpack(packed, out, parallel=one_job)),
        "copy": fresh(scratch / "copy", lambda out: shutil.copytree(model, out)),
    }
    seconds: dict[str, list[float]] = {step: [] for step in steps}
    for _ in range(rounds):
        for step, run in steps.items():
            start = time.process_time()
            run()
            seconds[step].append(time.process_time() - start)
    equal = all((plain / file.name).read_bytes() == file.read_bytes() for file in model.iterdir())
    fresh(alone, lambda out: freebits.pack(model, out, codec="none", parallel=one_job))()
    size, n_weights = bytes_on_disk(Checkpoint(model)), sum(spec.numel for spec in Checkpoint(model).specs.values())
    with_base = bytes_on_disk(PackedFolder(packed))
    rates = (f"{size / median(seconds[step]) / 1e6:.0f}" for step in steps)
    peers = bytes_of_peers(Checkpoint(model), Checkpoint(base))
    share = f"{with_base / size:.2%}", f"{8 * with_base / n_weights:.3f}"
    return (name.strip(), base_name, size, bytes_on_disk(PackedFolder(alone)), with_base, *share, *peers, *rates, equal)


def bytes_of_peers(model: Checkpoint, base: Checkpoint) -> tuple[int | str, int, int]:
    """Return the bytes of all tensors as XOR with ZipNN, as XOR on byte planes, and as differences on byte planes."""
    try:
        zipnn = import_module("zipnn").ZipNN(bytearray_dtype="bfloat16", threads=1)
    except ImportError:
        zipnn = None
    totals = [0, 0, 0]
    for name, spec in model.specs.items():
        values, other = (bytes_of(source[name]).view("<u2") for source in (model, base))
        other = np.pad(other, (0, max(0, len(values) - len(other))))[: len(values)]
        xor = values ^ other
        keys = [np.where(bits >> 15, ~bits, bits | 0x8000) for bits in (values, other)]
        difference = (keys[0] - keys[1]).astype(np.int16)
        zigzag = ((difference << 1) ^ (difference >> 15)).view(np.uint16)
        totals[0] += len(zipnn.compress(bytearray(xor.tobytes()))) if zipnn else 0
        for place, data in ((1, xor), (2, zigzag)):
            coded = compress(data.view(np.uint8), TensorSpec("U16", spec.shape).dtype_name)
            totals[place] += spec.n_bytes if coded is None else len(coded)
    return totals[0] or "", totals[1], totals[2]


def series(finetunes: Path, scratch: Path) -> tuple[Any, ...]:
    """Pack the ten checkpoints of one run with the first as the base, and without a base. Return a row of the table."""
    models = sorted(finetunes.glob("fast-*"), key=lambda path: int(path.name.split("-")[1]))
    size = sum(bytes_on_disk(Checkpoint(model)) for model in models)
    sizes = {}
    for choice in ("first", "none"):
        shutil.rmtree(scratch / "series", ignore_errors=True)
        result = freebits.api.pack.pack_series(models, scratch / "series", base=choice)
        sizes[choice] = sum(facts["bytes"]["packed"] for facts in result["models"].values())
    n_weights = sum(spec.numel for model in models for spec in Checkpoint(model).specs.values())
    share = f"{sizes['first'] / size:.2%}", f"{8 * sizes['first'] / n_weights:.3f}"
    return (f"{len(models)} checkpoints", "first", size, sizes["none"], sizes["first"], *share, *[""] * 7)


def lossy(finetunes: Path, name: str, base: str, bits: float, windows: torch.Tensor, out: Path) -> tuple[Any, ...]:
    """Quantize a model, with or without its base. Return a row of the table."""
    shutil.rmtree(out, ignore_errors=True)
    options: dict[str, Any] = {"bits": bits, "calibration": embedded_text()[1], "samples": 16}
    facts = freebits.quantize(finetunes / name, out, base=finetunes / base if base else None, **options)
    return name, base, bits, facts["bytes"]["packed"], *distance(finetunes / name, out, windows)


def distance(model: Path, other: Path, windows: torch.Tensor) -> tuple[str, str]:
    """Return the mean KL divergence of `other` from `model`, and the ratio of perplexities."""
    measured = compare_models(model, other, windows, silent)
    return f"{measured['mean_kl']:.5f}", f"{measured['ratio']:.4f}"


if __name__ == "__main__":
    main()
