"""Valid folders of a tiny model: dense, sliced, low-rank, packed (also with a base) and quantized."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import freebits
from tests.tiny import random_text, redigest, tiny_model, tiny_tokenizer

TEXT = random_text(600)


def make_bases(folder: Path) -> None:
    """Write the valid folders into `folder`."""
    options: dict[str, Any] = {"calibration": TEXT, "samples": 8, "seq_len": 32}
    tiny_model(dtype=torch.float16).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    freebits.slice_model(folder / "dense", folder / "sliced", sparsity=0.25, force=True, **options)
    freebits.lowrank(folder / "dense", folder / "low rank", **options)
    freebits.pack(folder / "dense", folder / "none", codec="none")
    _pack_delta(folder / "dense", folder / "delta")
    freebits.pack(folder / "sliced", folder / "canonical")
    freebits.pack(folder / "sliced", folder / "plain canonical", entropy="none")
    freebits.pack(folder / "sliced", folder / "bits-back", codec="bits-back", entropy="none")
    freebits.quantize(folder / "dense", folder / "integers", bits=4, **options)
    freebits.quantize(folder / "dense", folder / "pyramid", method="pyramid", bits=3, rotate="hadamard", **options)


def _pack_delta(dense: Path, out: Path) -> None:
    """Write `changed`, which differs a little from `dense`. Pack it into `out`, which also gets a copy of its base."""
    model = out.with_name("changed")
    shutil.copytree(dense, model)
    tensors = load_file(dense / "model.safetensors")
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, model / "model.safetensors")
    freebits.pack(model, out, base=dense)
    shutil.copytree(dense, out / "base")
    redigest(out, lambda manifest: manifest["base"].update(model="base"))
