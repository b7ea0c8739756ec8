"""Wrong bases, and messages of differences that no encoder writes, with all digests recomputed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from freebits.codecs.bits import zstd
from tests.attacks import attack
from tests.attacks.codes import Tensors, change_message, change_stored
from tests.tiny import redigest


def change_base(folder: Path, **changes: object) -> None:
    """Change the base in the manifest."""
    redigest(folder, lambda manifest: manifest["base"].update(changes))


def change_weights(folder: Path, factor: float, dtype: torch.dtype | None = None) -> None:
    """Change the weights of the base itself."""
    file = folder / "base" / "model.safetensors"
    save_file({name: (factor * tensor).to(dtype or tensor.dtype) for name, tensor in load_file(file).items()}, file)


def first_delta(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the first recipe with the code `delta`."""
    recipe: dict[str, Any] = next(recipe for recipe in manifest["recipes"] if recipe["code"] == "delta")
    return recipe


@attack("delta")
def base_that_is_the_folder_itself(folder: Path) -> None:
    change_base(folder, model=".")


@attack("delta")
def base_in_a_system_folder(folder: Path) -> None:
    change_base(folder, model="../" * 40 + "etc")


@attack("delta")
def base_at_an_address(folder: Path) -> None:
    change_base(folder, model="http://192.0.2.1/model")


@attack("delta")
def base_with_escapes_for_the_terminal(folder: Path) -> None:
    change_base(folder, model="\x1b[31mbase\n\n")


@attack("delta")
def base_with_a_name_of_a_megabyte(folder: Path) -> None:
    change_base(folder, model="x" * 10**6)


@attack("delta")
def base_with_other_weights(folder: Path) -> None:
    change_weights(folder, 1.5)


@attack("delta")
def base_with_another_dtype(folder: Path) -> None:
    change_weights(folder, 1, torch.float64)


@attack("delta")
def base_that_is_cut_off(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@attack("delta")
def base_with_a_tensor_of_a_terabyte(folder: Path) -> None:
    def grow(manifest: dict[str, Any]) -> None:
        name = first_delta(manifest)["takes"]["base"]
        manifest["base"]["tensors"][name][1] = "F16[549755813888, 1]"

    redigest(folder, grow)


@attack("delta")
def base_with_a_stored_tensor(folder: Path) -> None:
    def confuse(manifest: dict[str, Any]) -> None:
        tensors = manifest["base"]["tensors"]
        tensors[first_delta(manifest)["takes"]["message"]] = next(iter(tensors.values()))

    redigest(folder, confuse)


@attack("delta")
def rows_by_the_billion(folder: Path) -> None:
    redigest(folder, lambda manifest: first_delta(manifest)["params"].update(rows=2**31 - 1))


@attack("delta")
def rows_that_are_no_number(folder: Path) -> None:
    redigest(folder, lambda manifest: first_delta(manifest)["params"].update(rows=[1]))


@attack("delta")
def levels_of_four_gigabytes(folder: Path) -> None:
    change_stored(folder, change_message(lambda content: content.__setitem__(slice(0, 4), b"\xff" * 4)))


@attack("delta")
def levels_that_expand_a_thousand_times(folder: Path) -> None:
    bomb = zstd.compress(bytes(2**28))

    def damage(tensors: Tensors, manifest: dict[str, Any]) -> None:
        name = first_delta(manifest)["takes"]["message"]
        content = np.array([len(bomb), 0], "<u4").tobytes() + bomb
        tensors[name] = torch.frombuffer(bytearray(content.ljust(-(-len(content) // 8) * 8, b"\0")), dtype=torch.uint8)
        first_delta(manifest)["params"]["bytes"] = len(content)

    change_stored(folder, damage)


@attack("delta")
def differences_of_noise(folder: Path) -> None:
    noise = np.random.default_rng(0).bytes(1 << 16)
    change_stored(
        folder, change_message(lambda content: content.__setitem__(slice(120, None), noise[: len(content) - 120]))
    )
