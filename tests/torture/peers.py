"""Flipped bits in files that other libraries read: ZipNN's files, a `.pt` as SliceGPT writes it, and safetensors."""

import io
import random
import subprocess
from collections.abc import Callable

import torch
from safetensors.torch import load, save
from torch import Tensor

from tests.torture.findings import Finding

FLIPS = 1200


def peers(python: str | None) -> list[Finding]:
    """Flip bits for each reader. `python` is the Python of an environment with ZipNN; None leaves ZipNN out."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(64, 64, generator=generator).bfloat16() for i in range(4)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    findings = [
        flip_bits("torch.load from a .pt file (weights_only=True)", buffer.getvalue(), tensors, _torch_load),
        flip_bits("safetensors.torch.load", save(tensors), tensors, load),
    ]
    if python:
        findings.append(_flip_zipnn_bits(python))
    findings.append(_load_code())
    return findings


def flip_bits(
    reader: str, content: bytes, expected: dict[str, Tensor], read: Callable[[bytes], dict[str, Tensor]]
) -> Finding:
    """Flip random bits of a file, one at a time, and read the file."""
    finding, rng = Finding("peers", f"one flipped bit, read by {reader}"), random.Random(0)  # noqa: S311
    for _ in range(FLIPS):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        finding.times += 1
        try:
            tensors = read(bytes(damaged))
            equal = tensors.keys() == expected.keys() and all(
                torch.equal(tensors[key], expected[key]) for key in expected
            )
        except Exception:
            finding.refused += 1
        else:
            finding.harmless += equal
            finding.silent += not equal
    finding.notes = ["any error counts as refused"]
    return finding


def _torch_load(content: bytes) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(io.BytesIO(content), weights_only=True)
    return tensors


_ZIPNN = f"""
import os, random, torch, importlib.metadata
from zipnn import ZipNN
tensor = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
expected = tensor.view(torch.uint8).numpy().tobytes()
content = bytes(ZipNN(bytearray_dtype="bfloat16").compress(expected))
rng, counts = random.Random(0), [0, 0, 0, 0]
for _ in range({FLIPS}):
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            result = bytes(ZipNN(bytearray_dtype="bfloat16").decompress(bytes(damaged)))
        except BaseException:
            os._exit(0)
        os._exit(1 if result == expected else 2)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    counts[exit_code if exit_code >= 0 else 3] += 1
print(*counts, importlib.metadata.version("zipnn"))
"""


def _flip_zipnn_bits(python: str) -> Finding:
    """Flip bits of ZipNN's file. Each is read in its own process, because ZipNN can crash."""
    process = subprocess.run([python, "-c", _ZIPNN], capture_output=True, text=True, check=True)
    *counts, version = process.stdout.split()
    refused, harmless, silent, crashed = map(int, counts)
    finding = Finding("peers", f"one flipped bit, read by ZipNN {version}", FLIPS, refused + crashed, harmless, silent)
    finding.notes = [f"any error counts as refused; {crashed} crashed the process"]
    return finding


class _Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("ran.append(True)", {"ran": _RAN})


_RAN: list[bool] = []


def _load_code() -> Finding:
    """Load a `.pt` file that contains code. Before PyTorch 2.6, SliceGPT's loader ran it; now PyTorch refuses it."""
    finding = Finding("peers", "a .pt file with code, read by torch.load (weights_only=True, the default since 2.6)")
    buffer = io.BytesIO()
    torch.save({"weight": _Harmful()}, buffer)
    finding.times = 1
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception:
        finding.refused = 1
    finding.notes = ["with weights_only=False, the code runs; freebits reads no pickles"]
    return finding
