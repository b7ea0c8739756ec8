"""Stored tensors that no encoder writes, with all digests recomputed."""

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
    """Change the stored tensors and the manifest, and recompute all digests."""
    [file] = folder.glob("packed*.safetensors")
    tensors = load_file(file)

    def change_both(manifest: dict[str, Any]) -> None:
        change(tensors, manifest)
        manifest["digests"] = {
            name: digest(TensorSpec.of(tensor), bytes_of(tensor)) for name, tensor in tensors.items()
        }

    redigest(folder, change_both)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def first_part(tensors: Tensors, suffix: str) -> str:
    """Return the name of the first stored tensor whose name ends with `suffix`."""
    return next(name for name in tensors if name.endswith(suffix))


def recipe_of(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the recipe that takes a stored tensor."""
    recipe: dict[str, Any] = next(recipe for recipe in manifest["recipes"] if name in recipe["takes"].values())
    return recipe


def fill(suffix: str, value: float) -> Callable[[Tensors, dict[str, Any]], object]:
    """Return a change that fills the first stored tensor with `suffix` with one value."""
    return lambda tensors, _: tensors[first_part(tensors, suffix)].fill_(value)


def replace_entropy_code(tensors: Tensors, manifest: dict[str, Any], table: list[int], planes: bytes) -> None:
    """Replace the first entropy code with `table`, which holds the chunk size and plane lengths, and `planes`."""
    name = first_part(tensors, ".entropy")
    code = np.array(table, "<u4").tobytes() + planes
    recipe_of(manifest, name)["params"]["bytes"] = len(code)
    padded = code.ljust(-(-len(code) // 8) * 8, b"\0")
    tensors[name] = torch.from_numpy(np.frombuffer(padded, np.uint8).copy())


@attack("canonical")
def frame_that_claims_sixteen_gigabytes(folder: Path) -> None:
    claim = bytes.fromhex("28b52ffd") + bytes([0xE0]) + (2**34).to_bytes(8, "little") + bytes.fromhex("0300002a")
    change_stored(
        folder, lambda tensors, manifest: replace_entropy_code(tensors, manifest, [2**20, len(claim), 0], claim)
    )


@attack("canonical")
def frame_of_a_gigabyte_of_zeros(folder: Path) -> None:
    bomb = zstd.compress(bytes(2**28))
    change_stored(
        folder, lambda tensors, manifest: replace_entropy_code(tensors, manifest, [2**20, len(bomb), 0], bomb)
    )


@attack("canonical")
def chunks_by_the_hundred_thousand(folder: Path) -> None:
    change_stored(folder, lambda tensors, manifest: replace_entropy_code(tensors, manifest, [1, *([0] * 100_000)], b""))


@attack("canonical")
def chunks_of_four_billion(folder: Path) -> None:
    change_stored(
        folder,
        lambda tensors, manifest: replace_entropy_code(tensors, manifest, [2**32 - 1, 2**32 - 1, 2**32 - 1], b""),
    )


@attack("canonical")
def chunks_of_nothing(folder: Path) -> None:
    change_stored(folder, lambda tensors, manifest: replace_entropy_code(tensors, manifest, [0, 0, 0], b""))


@attack("canonical")
def entropy_code_without_a_byte(folder: Path) -> None:
    change_stored(folder, lambda tensors, manifest: replace_entropy_code(tensors, manifest, [], b""))


@attack("plain canonical")
def pivots_that_are_no_columns(folder: Path) -> None:
    def damage(tensors: Tensors, _: dict[str, Any]) -> None:
        name = first_part(tensors, ".pivots")
        tensors[name].fill_(2**31 - 1)

    change_stored(folder, damage)


@attack("plain canonical")
def spaces_that_overlap(folder: Path) -> None:
    def damage(tensors: Tensors, manifest: dict[str, Any]) -> None:
        params = recipe_of(manifest, first_part(tensors, ".pivots"))["params"]
        params["spaces"] = [params["spaces"][0]] * len(params["spaces"])

    change_stored(folder, damage)


@attack("plain canonical")
def factor_that_is_infinite(folder: Path) -> None:
    change_stored(folder, fill("shortcut.factor.words", float("inf")))


@attack("bits-back")
def eigenvalues_that_are_not_numbers(folder: Path) -> None:
    change_stored(folder, fill(".message", float("nan")))


@attack("bits-back")
def rotated_matrix_of_infinities(folder: Path) -> None:
    change_stored(folder, fill(".matrix", float("inf")))


@attack("bits-back")
def rotated_matrix_of_zeros(folder: Path) -> None:
    change_stored(folder, fill(".matrix", 0.0))


@attack("bits-back")
def rotated_matrix_of_the_largest_numbers(folder: Path) -> None:
    change_stored(folder, fill(".matrix", 65504.0))


@attack("bits-back")
def rank_that_is_negative(folder: Path) -> None:
    def damage(tensors: Tensors, manifest: dict[str, Any]) -> None:
        recipe_of(manifest, first_part(tensors, ".matrix"))["params"]["rank"] = -3

    change_stored(folder, damage)


@attack("bits-back")
def rank_of_a_million(folder: Path) -> None:
    def damage(tensors: Tensors, manifest: dict[str, Any]) -> None:
        recipe_of(manifest, first_part(tensors, ".matrix"))["params"]["rank"] = 10**6

    change_stored(folder, damage)


@attack("bits-back")
def sums_that_are_not_numbers(folder: Path) -> None:
    def damage(tensors: Tensors, manifest: dict[str, Any]) -> None:
        recipe_of(manifest, first_part(tensors, ".matrix"))["params"]["sums"] = [float("nan"), 1e400, "0", None]

    change_stored(folder, damage)


@attack("bits-back")
def corrections_beyond_the_words(folder: Path) -> None:
    def damage(tensors: Tensors, manifest: dict[str, Any]) -> None:
        name = first_part(tensors, ".matrix").replace(".matrix", ".corrections")
        recipe = recipe_of(manifest, first_part(tensors, ".matrix"))
        code = np.array([1, 40], "<u4").tobytes() + b"\0\0" + b"\xff" * 6
        tensors[name] = torch.frombuffer(bytearray(code), dtype=torch.uint8)
        recipe["takes"]["corrections"] = name
        recipe["params"]["corrections"] = len(code)

    change_stored(folder, damage)


@attack("bits-back")
def corrections_by_the_billion(folder: Path) -> None:
    def damage(tensors: Tensors, manifest: dict[str, Any]) -> None:
        name = first_part(tensors, ".matrix").replace(".matrix", ".corrections")
        recipe = recipe_of(manifest, first_part(tensors, ".matrix"))
        code = np.array([2**32 - 1, 1], "<u4").tobytes()
        tensors[name] = torch.frombuffer(bytearray(code), dtype=torch.uint8)
        recipe["takes"]["corrections"] = name
        recipe["params"]["corrections"] = len(code)

    change_stored(folder, damage)


def change_message(change: Callable[[bytearray], object]) -> Callable[[Tensors, dict[str, Any]], None]:
    """Return a change that edits the first stored message."""

    def damage(tensors: Tensors, _: dict[str, Any]) -> None:
        name = first_part(tensors, ".message")
        content = bytearray(tensors[name].numpy().tobytes())
        change(content)
        tensors[name] = torch.frombuffer(content, dtype=torch.uint8)

    return damage


@attack("integers")
def side_data_of_four_gigabytes(folder: Path) -> None:
    change_stored(folder, change_message(lambda content: content.__setitem__(slice(0, 4), b"\xff" * 4)))


@attack("integers")
def integers_beyond_the_table_by_the_billion(folder: Path) -> None:
    change_stored(folder, change_message(lambda content: content.__setitem__(slice(4, 8), b"\xff" * 4)))


@attack("integers")
def message_of_noise(folder: Path) -> None:
    noise = np.random.default_rng(0).bytes(1 << 16)
    change_stored(
        folder, change_message(lambda content: content.__setitem__(slice(8, None), noise[: len(content) - 8]))
    )


@attack("integers")
def message_of_zeros(folder: Path) -> None:
    change_stored(folder, change_message(lambda content: content.__setitem__(slice(0, None), bytes(len(content)))))


@attack("pyramid")
def points_beyond_the_last(folder: Path) -> None:
    change_stored(folder, lambda tensors, _: tensors[first_part(tensors, ".points")].fill_(255))


@attack("pyramid")
def pyramid_of_a_billion_pulses(folder: Path) -> None:
    def damage(tensors: Tensors, manifest: dict[str, Any]) -> None:
        recipe_of(manifest, first_part(tensors, ".points"))["params"].update(pulses=10**9, size=10**6)

    change_stored(folder, damage)


@attack("pyramid")
def rotation_with_a_seed_that_is_none(folder: Path) -> None:
    def damage(_: Tensors, manifest: dict[str, Any]) -> None:
        next(recipe for recipe in manifest["recipes"] if recipe["code"] == "hadamard")["params"]["seed"] = -(10**30)

    change_stored(folder, damage)


@attack("none")
def tensors_by_the_ten_thousand(folder: Path) -> None:
    """Each tensor has one value. The header of the original file lists the tensors, too."""
    names = [f"x{number}" for number in range(10_000)]
    entries = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    header = json.dumps(entries)

    def damage(tensors: Tensors, manifest: dict[str, Any]) -> None:
        tensors.clear()
        tensors |= {name: torch.zeros(1, dtype=torch.uint8) for name in names}
        manifest["recipes"] = []
        manifest["originals"]["model.safetensors"] = header

    change_stored(folder, damage)
