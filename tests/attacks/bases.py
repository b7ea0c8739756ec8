"""Valid folders of a tiny model: dense, sliced, low-rank, packed and quantized."""

from pathlib import Path
from typing import Any

import torch

import freebits
from tests.tiny import random_text, tiny_model, tiny_tokenizer

TEXT = random_text(600)


def make_bases(folder: Path) -> None:
    """Write the valid folders into `folder`."""
    options: dict[str, Any] = {"calibration": TEXT, "samples": 8, "seq_len": 32}
    tiny_model(dtype=torch.float16).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    freebits.slice_model(folder / "dense", folder / "sliced", sparsity=0.25, force=True, **options)
    freebits.lowrank(folder / "dense", folder / "low rank", **options)
    freebits.pack(folder / "dense", folder / "none", codec="none")
    freebits.pack(folder / "sliced", folder / "canonical")
    freebits.pack(folder / "sliced", folder / "plain canonical", entropy="none")
    freebits.pack(folder / "sliced", folder / "bits-back", codec="bits-back", entropy="none")
    freebits.quantize(folder / "dense", folder / "integers", bits=4, **options)
    freebits.quantize(folder / "dense", folder / "pyramid", method="pyramid", bits=3, rotate="hadamard", **options)
