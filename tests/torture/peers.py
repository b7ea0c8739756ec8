"""The same flips on what others read: ZipNN's files, a `.pt` as SliceGPT writes it, plain safetensors."""

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
    """Each; `python` is that of an environment with ZipNN."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(64, 64, generator=generator).bfloat16() for i in range(4)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    findings = [
        flipped("torch.load of a .pt (weights_only=True)", buffer.getvalue(), tensors, _torch_load),
        flipped("safetensors.torch.load", save(tensors), tensors, load),
    ]
    if python:
        findings.append(_zipnn(python))
    findings.append(_code_of_a_pickle())
    return findings


def flipped(name: str, content: bytes, true: dict[str, Tensor], read: Callable[[bytes], dict[str, Tensor]]) -> Finding:
    """A file with one bit flipped at a time, at places drawn at random."""
    finding, draw = Finding("peers", f"a flipped bit, read by {name}"), random.Random(0)  # noqa: S311
    for _ in range(FLIPS):
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        finding.times += 1
        try:
            found = read(bytes(changed))
            same = found.keys() == true.keys() and all(torch.equal(found[key], true[key]) for key in true)
        except Exception:
            finding.refused += 1
        else:
            finding.harmless += same
            finding.silent += not same
    finding.notes = ["an error of any kind counts as refused"]
    return finding


def _torch_load(content: bytes) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(io.BytesIO(content), weights_only=True)
    return found


_ZIPNN = f"""
import os, random, torch, importlib.metadata
from zipnn import ZipNN
tensor = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
true = tensor.view(torch.uint8).numpy().tobytes()
content = bytes(ZipNN(bytearray_dtype="bfloat16").compress(true))
draw, counts = random.Random(0), [0, 0, 0, 0]
for _ in range({FLIPS}):
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            found = bytes(ZipNN(bytearray_dtype="bfloat16").decompress(bytes(changed)))
        except BaseException:
            os._exit(0)
        os._exit(1 if found == true else 2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    counts[code if code >= 0 else 3] += 1
print(*counts, importlib.metadata.version("zipnn"))
"""


def _zipnn(python: str) -> Finding:
    """Each flip in a process of its own, which it may end."""
    done = subprocess.run([python, "-c", _ZIPNN], capture_output=True, text=True, check=True)
    *counts, version = done.stdout.split()
    refused, harmless, silent, crashed = map(int, counts)
    finding = Finding("peers", f"a flipped bit, read by ZipNN {version}", FLIPS, refused + crashed, harmless, silent)
    finding.notes = [f"an error of any kind counts as refused; {crashed} ended the process"]
    return finding


class _Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("ran.append(True)", {"ran": _RAN})


_RAN: list[bool] = []


def _code_of_a_pickle() -> Finding:
    """A `.pt` that carries a command: what SliceGPT's loader of before PyTorch 2.6 ran, and what is refused now."""
    finding = Finding("peers", "a .pt with code in it, read by torch.load (weights_only=True, the default since 2.6)")
    buffer = io.BytesIO()
    torch.save({"weight": _Harmful()}, buffer)
    finding.times = 1
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception:
        finding.refused = 1
    finding.notes = ["with weights_only=False it runs; `freebits` reads no pickle"]
    return finding
