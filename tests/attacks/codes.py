"""Stored tensors that no encoder writes, with every digest made right again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from freebits.codecs.bits import zstd
from freebits.packed.manifest import digest
from freebits.types import TensorSpec, bytes_of
from tests.attacks import attack
from tests.tiny import redigest

Tensors = dict[str, torch.Tensor]


def change_stored(folder: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> None:
    """Change stored tensors and the manifest, and make all digests right."""
    [file] = folder.glob("packed*.safetensors")
    tensors = load_file(file)

    def both(manifest: dict[str, Any]) -> None:
        change(tensors, manifest)
        manifest["digests"] = {name: digest(TensorSpec.of(t), bytes_of(t)) for name, t in tensors.items()}

    redigest(folder, both)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def part(tensors: Tensors, suffix: str) -> str:
    """The first stored tensor of that part of a code."""
    return next(name for name in tensors if name.endswith(suffix))


def recipe_of(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """The recipe that takes a stored tensor."""
    found: dict[str, Any] = next(of for of in manifest["recipes"] if name in of["takes"].values())
    return found


def filled(name: str, value: float) -> Callable[[Tensors, dict[str, Any]], object]:
    """Every number of the first tensor of a part is that."""
    return lambda tensors, _: tensors[part(tensors, name)].fill_(value)


def framed(tensors: Tensors, manifest: dict[str, Any], table: list[int], planes: bytes) -> None:
    """Another entropy code in the place of the first."""
    name = part(tensors, ".entropy")
    coded = np.array(table, "<u4").tobytes() + planes
    recipe_of(manifest, name)["params"]["bytes"] = len(coded)
    padded = coded.ljust(-(-len(coded) // 8) * 8, b"\0")
    tensors[name] = torch.from_numpy(np.frombuffer(padded, np.uint8).copy())


@attack("canonical")
def frame_that_claims_sixteen_gigabytes(folder: Path) -> None:
    claim = bytes.fromhex("28b52ffd") + bytes([0xE0]) + (2**34).to_bytes(8, "little") + bytes.fromhex("0300002a")
    change_stored(folder, lambda tensors, manifest: framed(tensors, manifest, [2**20, len(claim), 0], claim))


@attack("canonical")
def frame_of_a_gigabyte_of_zeros(folder: Path) -> None:
    bomb = zstd.compress(bytes(2**28))
    change_stored(folder, lambda tensors, manifest: framed(tensors, manifest, [2**20, len(bomb), 0], bomb))


@attack("canonical")
def chunks_by_the_hundred_thousand(folder: Path) -> None:
    change_stored(folder, lambda tensors, manifest: framed(tensors, manifest, [1, *([0] * 100_000)], b""))


@attack("canonical")
def chunks_of_four_billion(folder: Path) -> None:
    change_stored(folder, lambda tensors, manifest: framed(tensors, manifest, [2**32 - 1, 2**32 - 1, 2**32 - 1], b""))


@attack("canonical")
def chunks_of_nothing(folder: Path) -> None:
    change_stored(folder, lambda tensors, manifest: framed(tensors, manifest, [0, 0, 0], b""))


@attack("canonical")
def entropy_code_without_a_byte(folder: Path) -> None:
    change_stored(folder, lambda tensors, manifest: framed(tensors, manifest, [], b""))


@attack("plain canonical")
def pivots_that_are_no_columns(folder: Path) -> None:
    def spoil(tensors: Tensors, _: dict[str, Any]) -> None:
        name = part(tensors, ".pivots")
        tensors[name].fill_(2**31 - 1)

    change_stored(folder, spoil)


@attack("plain canonical")
def spaces_that_overlap(folder: Path) -> None:
    def spoil(tensors: Tensors, manifest: dict[str, Any]) -> None:
        of = recipe_of(manifest, part(tensors, ".pivots"))
        of["params"]["spaces"] = [of["params"]["spaces"][0]] * len(of["params"]["spaces"])

    change_stored(folder, spoil)


@attack("plain canonical")
def factor_that_is_infinite(folder: Path) -> None:
    change_stored(folder, filled("shortcut.factor.words", float("inf")))


@attack("bits-back")
def eigenvalues_that_are_not_numbers(folder: Path) -> None:
    change_stored(folder, filled(".message", float("nan")))


@attack("bits-back")
def rotated_matrix_of_infinities(folder: Path) -> None:
    change_stored(folder, filled(".matrix", float("inf")))


@attack("bits-back")
def rotated_matrix_of_zeros(folder: Path) -> None:
    change_stored(folder, filled(".matrix", 0.0))


@attack("bits-back")
def rotated_matrix_of_the_largest_numbers(folder: Path) -> None:
    change_stored(folder, filled(".matrix", 65504.0))


@attack("bits-back")
def rank_that_is_negative(folder: Path) -> None:
    def spoil(tensors: Tensors, manifest: dict[str, Any]) -> None:
        recipe_of(manifest, part(tensors, ".matrix"))["params"]["rank"] = -3

    change_stored(folder, spoil)


@attack("bits-back")
def rank_of_a_million(folder: Path) -> None:
    def spoil(tensors: Tensors, manifest: dict[str, Any]) -> None:
        recipe_of(manifest, part(tensors, ".matrix"))["params"]["rank"] = 10**6

    change_stored(folder, spoil)


@attack("bits-back")
def sums_that_are_not_numbers(folder: Path) -> None:
    def spoil(tensors: Tensors, manifest: dict[str, Any]) -> None:
        recipe_of(manifest, part(tensors, ".matrix"))["params"]["sums"] = [float("nan"), 1e400, "0", None]

    change_stored(folder, spoil)


@attack("bits-back")
def corrections_beyond_the_words(folder: Path) -> None:
    def spoil(tensors: Tensors, manifest: dict[str, Any]) -> None:
        name = part(tensors, ".matrix").replace(".matrix", ".corrections")
        of = recipe_of(manifest, part(tensors, ".matrix"))
        code = np.array([1, 40], "<u4").tobytes() + b"\0\0" + b"\xff" * 6
        tensors[name] = torch.frombuffer(bytearray(code), dtype=torch.uint8)
        of["takes"]["corrections"] = name
        of["params"]["corrections"] = len(code)

    change_stored(folder, spoil)


@attack("bits-back")
def corrections_by_the_billion(folder: Path) -> None:
    def spoil(tensors: Tensors, manifest: dict[str, Any]) -> None:
        name = part(tensors, ".matrix").replace(".matrix", ".corrections")
        of = recipe_of(manifest, part(tensors, ".matrix"))
        code = np.array([2**32 - 1, 1], "<u4").tobytes()
        tensors[name] = torch.frombuffer(bytearray(code), dtype=torch.uint8)
        of["takes"]["corrections"] = name
        of["params"]["corrections"] = len(code)

    change_stored(folder, spoil)


def message(change: Callable[[bytearray], object]) -> Callable[[Tensors, dict[str, Any]], None]:
    """Another message of integers."""

    def spoil(tensors: Tensors, _: dict[str, Any]) -> None:
        name = part(tensors, ".message")
        content = bytearray(tensors[name].numpy().tobytes())
        change(content)
        tensors[name] = torch.frombuffer(content, dtype=torch.uint8)

    return spoil


@attack("integers")
def side_data_of_four_gigabytes(folder: Path) -> None:
    change_stored(folder, message(lambda content: content.__setitem__(slice(0, 4), b"\xff" * 4)))


@attack("integers")
def integers_beyond_the_table_by_the_billion(folder: Path) -> None:
    change_stored(folder, message(lambda content: content.__setitem__(slice(4, 8), b"\xff" * 4)))


@attack("integers")
def message_of_noise(folder: Path) -> None:
    noise = np.random.default_rng(0).bytes(1 << 16)
    change_stored(folder, message(lambda content: content.__setitem__(slice(8, None), noise[: len(content) - 8])))


@attack("integers")
def message_of_zeros(folder: Path) -> None:
    change_stored(folder, message(lambda content: content.__setitem__(slice(0, None), bytes(len(content)))))


@attack("pyramid")
def points_beyond_the_last(folder: Path) -> None:
    change_stored(folder, lambda tensors, _: tensors[part(tensors, ".points")].fill_(255))


@attack("pyramid")
def pyramid_of_a_billion_pulses(folder: Path) -> None:
    def spoil(tensors: Tensors, manifest: dict[str, Any]) -> None:
        recipe_of(manifest, part(tensors, ".points"))["params"].update(pulses=10**9, size=10**6)

    change_stored(folder, spoil)


@attack("pyramid")
def rotation_with_a_seed_that_is_none(folder: Path) -> None:
    def spoil(_: Tensors, manifest: dict[str, Any]) -> None:
        next(of for of in manifest["recipes"] if of["code"] == "hadamard")["params"]["seed"] = -(10**30)

    change_stored(folder, spoil)


@attack("gptq")
def grid_of_a_billion_bits(folder: Path) -> None:
    def spoil(tensors: Tensors, manifest: dict[str, Any]) -> None:
        recipe_of(manifest, part(tensors, ".scales"))["params"]["bits"] = 10**9

    change_stored(folder, spoil)


@attack("gptq")
def grid_in_groups_of_nothing(folder: Path) -> None:
    def spoil(tensors: Tensors, manifest: dict[str, Any]) -> None:
        recipe_of(manifest, part(tensors, ".scales"))["params"]["group"] = 0

    change_stored(folder, spoil)


@attack("none")
def tensors_by_the_ten_thousand(folder: Path) -> None:
    """One number each, in the header of an original file too."""
    names = [f"x{number}" for number in range(10_000)]
    header = json.dumps({n: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, n in enumerate(names)})

    def spoil(tensors: Tensors, manifest: dict[str, Any]) -> None:
        tensors.clear()
        tensors |= {name: torch.zeros(1, dtype=torch.uint8) for name in names}
        manifest["recipes"] = []
        manifest["originals"]["model.safetensors"] = header

    change_stored(folder, spoil)
