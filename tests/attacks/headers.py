"""Weights files with wrong headers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attacks import attack

WEIGHTS = "model.safetensors"


def change_header(folder: Path, change: Callable[[dict[str, Any]], object], file: str = WEIGHTS) -> None:
    """Change the header of a weights file, but not the tensors. `change` edits the header, or returns the new bytes."""
    content = (folder / file).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    replacement = change(header)
    text = replacement if isinstance(replacement, bytes) else json.dumps(header).encode()
    (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def first_entry(header: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of the first tensor."""
    entry: dict[str, Any] = next(entry for name, entry in header.items() if name != "__metadata__")
    return entry


@attack("dense")
def header_of_an_exabyte(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + content[8:])


@attack("dense")
def header_of_four_gigabytes_in_a_sparse_file(folder: Path) -> None:
    with (folder / WEIGHTS).open("wb") as file:
        file.write((2**32 - 16).to_bytes(8, "little") + b"{")
        file.truncate(2**32)


@attack("dense")
def header_that_is_no_text(folder: Path) -> None:
    change_header(folder, lambda _: b"\xff\xfe{}")


@attack("dense")
def header_that_is_a_list(folder: Path) -> None:
    change_header(folder, lambda _: b"[[]]")


@attack("dense")
def header_nested_without_end(folder: Path) -> None:
    change_header(folder, lambda _: b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}")


@attack("dense")
def tensors_that_overlap(folder: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        entries[1]["data_offsets"] = entries[0]["data_offsets"]

    change_header(folder, overlap)


@attack("dense")
def tensors_that_end_beyond_the_file(folder: Path) -> None:
    change_header(folder, lambda header: first_entry(header).update(data_offsets=[0, 2**50]))


@attack("dense")
def tensor_that_begins_before_the_file(folder: Path) -> None:
    change_header(folder, lambda header: first_entry(header).update(data_offsets=[-8, 0]))


@attack("dense")
def offsets_that_are_no_numbers(folder: Path) -> None:
    change_header(folder, lambda header: first_entry(header).update(data_offsets=["0", 1e300]))


@attack("dense")
def shape_that_overflows(folder: Path) -> None:
    change_header(folder, lambda header: first_entry(header).update(shape=[2**32, 2**32, 2]))


@attack("dense")
def shape_with_zero_and_infinity(folder: Path) -> None:
    change_header(folder, lambda header: first_entry(header).update(shape=[0, 2**60]))


@attack("dense")
def shape_that_is_negative(folder: Path) -> None:
    change_header(folder, lambda header: first_entry(header).update(shape=[-1, -3072]))


@attack("dense")
def dtype_that_nobody_knows(folder: Path) -> None:
    change_header(folder, lambda header: first_entry(header).update(dtype="F1"))


@attack("dense")
def names_twice(folder: Path) -> None:
    def twice(header: dict[str, Any]) -> bytes:
        text = json.dumps(header)
        name = next(name for name in header if name != "__metadata__")
        return (text[:-1] + f', "{name}": ' + json.dumps(header[name]) + "}").encode()

    change_header(folder, twice)


@attack("dense")
def name_with_escapes_for_the_terminal(folder: Path) -> None:
    def rename(header: dict[str, Any]) -> None:
        name = next(name for name in header if name != "__metadata__")
        header["\x1b]0;gone\x07\x1b[2J\n" + "x" * 100_000] = header.pop(name)

    change_header(folder, rename)


@attack("dense")
def file_without_a_byte(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


@attack("dense")
def file_cut_in_the_middle(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
