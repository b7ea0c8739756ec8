"""Packed folders with a bit, an end or two blocks that are not what was written; found before a weight is used."""

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
SAMPLES = 10_000


def small_folders(folder: Path) -> dict[str, Path]:
    """Packed folders of a model of which every bit can be tried; its tokenizer has 96 words."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options: dict[str, Any] = {"calibration": TEXT, "samples": 8, "seq_len": 32}
    tiny_model(dtype=torch.float16, **sizes).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    freebits.slice_model(folder / "dense", folder / "sliced", sparsity=0.25, force=True, **options)
    freebits.pack(folder / "sliced", folder / "canonical")
    freebits.quantize(folder / "dense", folder / "integers", target_kl=1e-3, **options)
    return {name: folder / name for name in ("canonical", "integers")}


def every_bit(folder: Path, name: str) -> list[Finding]:
    """Every flipped bit, every shorter length and every swap of two neighbouring blocks of each of a folder's files."""
    true = tensors_of(folder)
    flips = Finding("damage", f"a flipped bit of a small folder, {name}: every one")
    ends = Finding("damage", f"a file of a small folder, {name}, that ends early: at every length")
    swaps = Finding("damage", f"two neighbouring blocks of {BLOCK} bytes, {name}, exchanged: every pair")
    for file in [*folder.glob("*.safetensors"), folder / "freebits.json", folder / "config.json"]:
        whole = file.read_bytes()
        for position in range(len(whole)):
            for bit in range(8):
                _write_at(file, position, bytes([whole[position] ^ 1 << bit]))
                _try(flips, folder, true)
            _write_at(file, position, whole[position : position + 1])
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            _try(ends, folder, true)
        file.write_bytes(whole)
        for at in range(0, len(whole) - 2 * BLOCK + 1, BLOCK):
            first, second = whole[at : at + BLOCK], whole[at + BLOCK : at + 2 * BLOCK]
            if first != second:
                file.write_bytes(whole[:at] + second + first + whole[at + 2 * BLOCK :])
                _try(swaps, folder, true)
        file.write_bytes(whole)
    return [flips, ends, swaps]


def samples(folder: Path, count: int = SAMPLES) -> Finding:
    """Flipped bits of a large folder, drawn at random; of a weight, what is made of it is read, of the rest all."""
    finding = Finding("damage", "a flipped bit of the demo model's folder (canonical, entropy-coded), at random")
    packed, draw = PackedFolder(folder), random.Random(0)  # noqa: S311
    check_recipes = _dependants(packed)
    files = [*packed.weight_files, folder / "freebits.json", folder / "config.json"]
    sizes = [file.stat().st_size for file in files]
    for _ in range(count):
        [file] = draw.choices(files, sizes)
        position, bit = draw.randrange(file.stat().st_size), 1 << draw.randrange(8)
        state = file.stat()
        byte = _read_at(file, position)
        _write_at(file, position, bytes([byte ^ bit]))
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # or a change would be seen by its time
        finding.times += 1
        try:
            name = _tensor_at(packed, file, position)
            if name is None:
                PackedFolder(folder)
            else:
                packed[check_recipes[name]]
        except FreebitsError:
            finding.refused += 1
        else:
            finding.silent += 1
            finding.notes.append(f"{file.name} byte {position}")
        _write_at(file, position, bytes([byte]))
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    return finding


def demo_folder(scratch: Path) -> Path:
    """The demo model, packed."""
    from examples.demo_model import demo_model

    freebits.pack(demo_model(), scratch / "demo")
    return scratch / "demo"


def _try(finding: Finding, folder: Path, true: Mapping[str, Tensor]) -> None:
    """Read everything, as `load` does before a weight is used."""
    finding.times += 1
    try:
        found = tensors_of(folder)
    except FreebitsError as error:
        finding.refused += 1
        if "\n" in str(error):
            finding.tracebacks += 1
    except Exception as error:
        finding.tracebacks += 1
        finding.notes = finding.notes or [repr(error)[:100]]
    else:
        same = found.keys() == true.keys() and all(torch.equal(found[name], true[name]) for name in true)
        finding.harmless += same
        finding.silent += not same


def _write_at(file: Path, position: int, content: bytes) -> None:
    with file.open("r+b") as open_folder:
        open_folder.seek(position)
        open_folder.write(content)


def _read_at(file: Path, position: int) -> int:
    with file.open("rb") as open_folder:
        open_folder.seek(position)
        return open_folder.read(1)[0]


def _tensor_at(packed: PackedFolder, file: Path, position: int) -> str | None:
    """The stored tensor in which a byte of a weights file lies; None for a byte of something else."""
    for weights in packed.files:
        if weights.path == file:
            start = file.stat().st_size - weights.n_bytes
            for name, entry in weights.entries.items():
                if entry.begin <= position - start < entry.end:
                    return name
    return None


def _dependants(packed: PackedFolder) -> dict[str, str]:
    """For each stored tensor one of the model's that is made of it."""

    def roots(name: str) -> Iterator[str]:
        recipe = next((recipe for recipe in packed.manifest.recipes if name in recipe.makes), None)
        if recipe is None:
            yield name
        for part in recipe.takes.values() if recipe else ():
            yield from roots(part)

    return {root: name for name in packed.specs for root in roots(name)}
