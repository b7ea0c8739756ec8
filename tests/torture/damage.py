"""Packed folders with a flipped bit, a truncated file or two exchanged blocks.

Readers must notice the damage before a weight is used.
"""

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import freebits
from freebits.errors import FreebitsError
from freebits.packed.reader import PackedFolder
from tests.attacks.bases import TEXT
from tests.tiny import tensors_of, tiny_model, tiny_tokenizer
from tests.torture.findings import Finding

BLOCK = 64
RANDOM_FLIPS = 10_000


def small_folders(folder: Path) -> dict[str, Path]:
    """Make packed folders of a model so small that every bit can be flipped. Return name → folder."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options: dict[str, Any] = {"calibration": TEXT, "samples": 8, "seq_len": 32}
    tiny_model(dtype=torch.float16, **sizes).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    freebits.slice_model(folder / "dense", folder / "sliced", sparsity=0.25, force=True, **options)
    freebits.pack(folder / "sliced", folder / "canonical")
    freebits.quantize(folder / "dense", folder / "integers", target_kl=1e-3, **options)
    return {name: folder / name for name in ("canonical", "integers")}


def exhaustive_damage(folder: Path, name: str) -> list[Finding]:
    """Flip every bit, truncate to every length and exchange all neighboring blocks, in each file of a folder."""
    expected = tensors_of(folder)
    flips = Finding("damage", f"one flipped bit in a small folder, {name}: every bit")
    truncations = Finding("damage", f"one truncated file in a small folder, {name}: every length")
    swaps = Finding("damage", f"two neighboring blocks of {BLOCK} bytes exchanged, {name}: every pair")
    for file in [*folder.glob("*.safetensors"), folder / "freebits.json", folder / "config.json"]:
        content = file.read_bytes()
        for position in range(len(content)):
            for bit in range(8):
                _write_at(file, position, bytes([content[position] ^ 1 << bit]))
                _read_damaged(flips, folder, expected)
            _write_at(file, position, content[position : position + 1])
        for length in range(len(content)):
            file.write_bytes(content[:length])
            _read_damaged(truncations, folder, expected)
        file.write_bytes(content)
        for start in range(0, len(content) - 2 * BLOCK + 1, BLOCK):
            first, second = content[start : start + BLOCK], content[start + BLOCK : start + 2 * BLOCK]
            if first != second:
                file.write_bytes(content[:start] + second + first + content[start + 2 * BLOCK :])
                _read_damaged(swaps, folder, expected)
        file.write_bytes(content)
    return [flips, truncations, swaps]


def random_flips(folder: Path, count: int = RANDOM_FLIPS) -> Finding:
    """Flip random bits in the files of a large folder, one at a time.

    If the bit belongs to a stored tensor, read a model tensor that is made of it. Otherwise open the folder.
    """
    finding = Finding("damage", "one flipped bit in the demo model's folder (canonical, entropy-coded): random bits")
    packed, rng = PackedFolder(folder), random.Random(0)  # noqa: S311
    dependents = _dependents(packed)
    files = [*packed.weight_files, folder / "freebits.json", folder / "config.json"]
    sizes = [file.stat().st_size for file in files]
    for _ in range(count):
        [file] = rng.choices(files, sizes)
        position, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
        state = file.stat()
        byte = _read_at(file, position)
        _write_at(file, position, bytes([byte ^ bit]))
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # because readers notice a newer time
        finding.times += 1
        try:
            name = _tensor_at(packed, file, position)
            if name is None:
                PackedFolder(folder)
            else:
                packed[dependents[name]]
        except FreebitsError:
            finding.refused += 1
        else:
            finding.silent += 1
            finding.notes.append(f"{file.name} byte {position}")
        _write_at(file, position, bytes([byte]))
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    return finding


def demo_folder(scratch: Path) -> Path:
    """Pack the demo model and return the packed folder."""
    from examples.demo_model import demo_model

    freebits.pack(demo_model(), scratch / "demo")
    return scratch / "demo"


def _read_damaged(finding: Finding, folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Read all tensors of a damaged folder, and count the outcome."""
    finding.times += 1
    try:
        tensors = tensors_of(folder)
    except FreebitsError as error:
        finding.refused += 1
        if "\n" in str(error):
            finding.tracebacks += 1
    except Exception as error:
        finding.tracebacks += 1
        finding.notes = finding.notes or [repr(error)[:100]]
    else:
        equal = tensors.keys() == expected.keys() and all(
            torch.equal(tensors[name], expected[name]) for name in expected
        )
        finding.harmless += equal
        finding.silent += not equal


def _write_at(file: Path, position: int, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        stream.write(content)


def _read_at(file: Path, position: int) -> int:
    with file.open("rb") as stream:
        stream.seek(position)
        return stream.read(1)[0]


def _tensor_at(packed: PackedFolder, file: Path, position: int) -> str | None:
    """Return the name of the stored tensor that contains a byte of a file, or None if no tensor contains the byte."""
    for weights in packed.files:
        if weights.path == file:
            start = file.stat().st_size - weights.n_bytes
            for name, entry in weights.entries.items():
                if entry.begin <= position - start < entry.end:
                    return name
    return None


def _dependents(packed: PackedFolder) -> dict[str, str]:
    """Map each stored tensor to one model tensor that is made of it."""

    def stored_names(name: str) -> Iterator[str]:
        """Yield the names of the stored tensors that a tensor is made of."""
        recipe = next((recipe for recipe in packed.manifest.recipes if name in recipe.makes), None)
        if recipe is None:
            yield name
        for taken in recipe.takes.values() if recipe else ():
            yield from stored_names(taken)

    return {stored: name for name in packed.specs for stored in stored_names(name)}
