"""The damage to a packed folder. Every choice is a number that hypothesis draws, or that a fuzzer's bytes give."""

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from freebits.errors import FreebitsError
from freebits.execution.executor import Parallel
from freebits.packed.manifest import digest
from freebits.packed.reader import PackedFolder
from freebits.storage.safetensors_files import parse_header
from freebits.types import TensorSpec

GOLDEN = Path(__file__).parent.parent / "golden" / "v1"
CODECS = ("bits-back", "canonical", "integers", "none", "pyramid")
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**16, 2**31, 2**40, 2**63, 10**30, -(2**63), 0.5, 1e308, float("nan")),
    *("", "a", "../x", "F16", "BF16", "U8", "F16[0]", "F16[2, 3]", "F64[65536, 65536]", "I32[1]", "\u202e", "x" * 300),
    *([], {}, [[]], [0] * 50, {"": {}}, "entropy", "integers", "bits-back", "lower", "symmetric", "pyramid", "pivots"),
)
"""Values that can replace any value of a JSON tree."""
Choose = Callable[[int], int]
"""Function that returns a number from 0 to its argument less one."""


@dataclass
class FolderContents:
    """The contents of a packed folder. `header` and `data` are those of its weights file."""

    manifest: dict[str, Any]
    config: dict[str, Any]
    header: dict[str, Any]
    data: bytes


@cache
def golden_contents(codec: str) -> FolderContents:
    """Return the contents of a golden folder."""
    folder = GOLDEN / codec
    content = (folder / "packed.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    manifest = json.loads((folder / "freebits.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    return FolderContents(manifest, config, json.loads(content[8:end]), content[end:])


def damaged_contents(choose: Choose) -> FolderContents:
    """Return the contents of a golden folder with one to four changes."""
    contents = copy.deepcopy(golden_contents(CODECS[choose(len(CODECS))]))
    for _ in range(1 + choose(4)):
        target = choose(6)
        if target < 3:
            change_tree((contents.manifest, contents.manifest.get("recipes"), contents.config)[target], choose)
        elif target == 3:
            change_tree(contents.header, choose)
        else:
            contents.data = change_bytes(contents.data, choose)
    return contents


def change_tree(tree: Any, choose: Choose) -> None:
    """Change one value of a JSON tree in place.

    The value is deleted, replaced by another value of its parent or by an odd value, repeated, or changed by up to 2.
    """
    if not isinstance(tree, (dict, list)) or not tree:
        return
    parent = tree
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = keys[choose(len(keys))]
        if not isinstance(parent[key], (dict, list)) or not parent[key] or not choose(4):
            break
        parent = parent[key]
    action = choose(8)
    if action == 0:
        del parent[key]
    elif action == 1:
        values = list(parent.values()) if isinstance(parent, dict) else parent
        parent[key] = copy.deepcopy(values[choose(len(values))])
    elif action == 2 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif action == 3 and isinstance(parent[key], int):
        parent[key] += choose(5) - 2
    else:
        parent[key] = copy.deepcopy(ODD_VALUES[choose(len(ODD_VALUES))])


def change_bytes(data: bytes, choose: Choose) -> bytes:
    """Replace a run of up to 16 bytes with random bytes, zeros or ones, or remove it."""
    start, length = choose(len(data)), 1 + choose(16)
    action = choose(4)
    replacement = (bytes(choose(256) for _ in range(length)), bytes(length), b"\xff" * length, b"")[action]
    return data[:start] + replacement + data[start + length :]


def write(contents: FolderContents, folder: Path) -> None:
    """Write a packed folder with matching digests, as an attacker would.

    The digests of tensors stay unchanged if the header cannot be parsed.
    """
    config = json.dumps(contents.config).encode()
    header = json.dumps(contents.header).encode()
    (folder / "config.json").write_bytes(config)
    (folder / "packed.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + contents.data)
    manifest = {key: value for key, value in contents.manifest.items() if key != "digest"}
    manifest["config"] = xxhash.xxh3_128_hexdigest(config)
    try:
        entries = parse_header(header.decode(), len(contents.data))
        digests = {entry.name: _digest(entry.spec, contents.data[entry.begin : entry.end]) for entry in entries}
        manifest["digests"] = {name: digests.get(name, old) for name, old in manifest["digests"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["digest"] = xxhash.xxh3_128_hexdigest(text.encode())
    (folder / "freebits.json").write_text(json.dumps(manifest))


def _digest(spec: TensorSpec, data: bytes) -> str:
    return digest(spec, np.frombuffer(data, np.uint8))


def read(folder: Path) -> bool:
    """Read a folder completely, as `load` does. Return whether the reader accepts it. Catch only FreebitsErrors."""
    try:
        packed = PackedFolder(folder)
        for _ in packed.model_tensors(Parallel(jobs=1)):
            pass
    except FreebitsError as error:
        if "\n" in str(error) or not str(error).isprintable():
            raise AssertionError(f"the message is not one printable line: {error!r}") from error
        return False
    return True


def run(choose: Choose) -> bool:
    """Damage and read a golden folder. Return whether the reader accepts it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:  # noqa: S108
        write(damaged_contents(choose), Path(folder))
        return read(Path(folder))
