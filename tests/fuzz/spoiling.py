"""What is spoiled, and how; every choice is a number, which hypothesis draws or a fuzzer's bytes tell."""

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
CODECS = ("bits-back", "canonical", "gptq", "integers", "none", "pyramid")
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**16, 2**31, 2**40, 2**63, 10**30, -(2**63), 0.5, 1e308, float("nan")),
    *("", "a", "../x", "F16", "BF16", "U8", "F16[0]", "F16[2, 3]", "F64[65536, 65536]", "I32[1]", "\u202e", "x" * 300),
    *([], {}, [[]], [0] * 50, {"": {}}, "entropy", "integers", "bits-back", "lower", "symmetric", "pyramid", "pivots"),
)
"""In the place of any value."""
Choose = Callable[[int], int]
"""A number below another."""


@dataclass
class Sound:
    """A packed folder in its parts."""

    manifest: dict[str, Any]
    config: dict[str, Any]
    header: dict[str, Any]
    data: bytes


@cache
def sound(codec: str) -> Sound:
    """A golden folder."""
    folder = GOLDEN / codec
    content = (folder / "packed.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    manifest = json.loads((folder / "freebits.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    return Sound(manifest, config, json.loads(content[8:end]), content[end:])


def spoiled(choose: Choose) -> Sound:
    """One of them with up to four things changed."""
    folder = copy.deepcopy(sound(CODECS[choose(len(CODECS))]))
    for _ in range(1 + choose(4)):
        what = choose(6)
        if what < 3:
            change_tree((folder.manifest, folder.manifest.get("recipes"), folder.config)[what], choose)
        elif what == 3:
            change_tree(folder.header, choose)
        else:
            folder.data = changed_bytes(folder.data, choose)
    return folder


def change_tree(tree: Any, choose: Choose) -> None:
    """Change one value of a JSON tree in place: another, another's, none, or twice."""
    if not isinstance(tree, (dict, list)) or not tree:
        return
    parent = tree
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = keys[choose(len(keys))]
        if not isinstance(parent[key], (dict, list)) or not parent[key] or not choose(4):
            break
        parent = parent[key]
    how = choose(8)
    if how == 0:
        del parent[key]
    elif how == 1:
        others = list(parent.values()) if isinstance(parent, dict) else parent
        parent[key] = copy.deepcopy(others[choose(len(others))])
    elif how == 2 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif how == 3 and isinstance(parent[key], int):
        parent[key] += choose(5) - 2
    else:
        parent[key] = copy.deepcopy(ODD[choose(len(ODD))])


def changed_bytes(data: bytes, choose: Choose) -> bytes:
    """A run of bytes that is another, zero, all ones or gone."""
    start, length = choose(len(data)), 1 + choose(16)
    how = choose(4)
    new = (bytes(choose(256) for _ in range(length)), bytes(length), b"\xff" * length, b"")[how]
    return data[:start] + new + data[start + length :]


def write(spoiled: Sound, folder: Path) -> None:
    """As a foe would: digests of what is there, where the header tells what that is."""
    config = json.dumps(spoiled.config).encode()
    header = json.dumps(spoiled.header).encode()
    (folder / "config.json").write_bytes(config)
    (folder / "packed.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + spoiled.data)
    manifest = {key: value for key, value in spoiled.manifest.items() if key != "digest"}
    manifest["config"] = xxhash.xxh3_128_hexdigest(config)
    try:
        entries = parse_header(header.decode(), len(spoiled.data))
        true = {entry.name: _digest(entry.spec, spoiled.data[entry.begin : entry.end]) for entry in entries}
        manifest["digests"] = {name: true.get(name, of) for name, of in manifest["digests"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["digest"] = xxhash.xxh3_128_hexdigest(text.encode())
    (folder / "freebits.json").write_text(json.dumps(manifest))


def _digest(spec: TensorSpec, data: bytes) -> str:
    return digest(spec, np.frombuffer(data, np.uint8))


def read(folder: Path) -> bool:
    """Read everything, as `load` does; whether it was taken for sound. Any error but ours passes through."""
    try:
        packed = PackedFolder(folder)
        for _ in packed.model_tensors(Parallel(jobs=1)):
            pass
    except FreebitsError as error:
        if "\n" in str(error) or not str(error).isprintable():
            raise AssertionError(f"more than a line: {error!r}") from error
        return False
    return True


def run(choose: Choose) -> bool:
    """Spoil and read."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:  # noqa: S108
        write(spoiled(choose), Path(folder))
        return read(Path(folder))
