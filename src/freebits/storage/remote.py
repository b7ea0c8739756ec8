"""Folders elsewhere: what fsspec reaches by a URL (`s3://`, `gs://`, `hf://`, `https://`, …).

One to read is mirrored: its small files are copied; weights stand there as holes of their sizes, which take no disk,
and are read from where they are, by range. One to write is finished here, then uploaded.
"""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import fsspec  # type: ignore[import-untyped]
import numpy as np

from freebits.errors import CheckpointError, one_line
from freebits.limits import COPIED_BYTES
from freebits.types import Bytes

_COPIED = ("*.json", "*.md", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_TRIED = ".freebits"
"""A file that is written to see whether one can be."""
_LAST = ("config.json",)
"""Without it a folder is no checkpoint: it is uploaded last."""
_mirrors: dict[Path, str] = {}
"""Mirror, or a file in it that is a hole → URL."""


class Readable(Protocol):
    """A file, read by range."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def state(self) -> tuple[object, ...]:
        """What changes when it is replaced or written to, as far as can be told."""

    def read(self, start: int, n_bytes: int) -> Bytes:
        """Bytes from `start` on.

        Raises:
            OSError: they cannot be had.
            ValueError: they are fewer.
        """


@dataclass(frozen=True)
class Remote:
    """A file at a URL."""

    url: str
    size: int = field(init=False)
    state: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        with _as_os_errors():
            system, name = fsspec.url_to_fs(self.url)
            told = system.info(name)
        object.__setattr__(self, "size", int(told.get("size") or 0))
        object.__setattr__(self, "state", _state(told))

    def read(self, start: int, n_bytes: int) -> Bytes:
        """Bytes from `start` on."""
        if not n_bytes:
            return np.empty(0, np.uint8)
        with _as_os_errors():
            system, name = fsspec.url_to_fs(self.url)
            with system.open(name, "rb", cache_type="none") as file:  # no more than what is asked for
                file.seek(start)
                data = file.read(n_bytes)
        if len(data) != n_bytes:
            raise ValueError(f"{len(data)} bytes came where {n_bytes} were asked for")
        return np.frombuffer(bytearray(data), np.uint8)


def _state(told: dict[str, Any]) -> tuple[object, ...]:
    return told.get("size"), *(str(told.get(key)) for key in _VERSIONS)


_VERSIONS = ("ETag", "etag", "LastModified", "mtime", "created", "generation", "commit_hash", "blob_id")
"""Under which file systems tell that a file is another one."""


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL that this is, if it is one; `pathlib` takes one of its slashes away."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?=[^/])", os.fspath(path))
    if not match or match[1] not in fsspec.available_protocols():
        return None
    return f"{match[1]}://{os.fspath(path)[match.end() :].rstrip('/')}"


@cache
def mirror(url: str) -> Path:
    """A folder here that stands for one elsewhere, as long as this process lives.

    Raises:
        CheckpointError: there is none, or it cannot be reached.
    """
    scratch = Path(tempfile.mkdtemp(prefix="mirror-", dir=_cache()))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    folder = scratch / PurePosixPath(url).name
    folder.mkdir()
    try:
        with _as_os_errors():
            system, root = fsspec.url_to_fs(url)
            found = system.find(root, detail=True)
            if not any(name.endswith("config.json") for name in found):
                raise FileNotFoundError("there is no config.json")
            for name, told in sorted(found.items()):
                _stand_in(system, name, told, folder, name[len(root) :].strip("/"), url)
    except OSError as error:
        raise CheckpointError(f"{url} cannot be read ({error}): check address, connection and key") from None
    _mirrors[folder] = url
    return folder


def original(path: Path) -> str | None:
    """The URL of a mirror, or of a file that a mirror holds no copy of; None for everything else."""
    return _mirrors.get(path)


def download(url: str, target: Path) -> None:
    """Download a file.

    Raises:
        CheckpointError: that fails.
    """
    try:
        with _as_os_errors():
            system, name = fsspec.url_to_fs(url)
            system.get_file(name, str(target))
    except OSError as error:
        raise CheckpointError(f"{url} cannot be downloaded ({error})") from None


def fill(folder: Path) -> None:
    """Download what a mirror only stands for, for those that read files themselves.

    Raises:
        CheckpointError: it cannot be had.
    """
    url = _mirrors.get(folder)
    if url is None:
        return
    for file in folder.glob("*.safetensors"):
        part = file.with_suffix(".part")
        download(f"{url}/{file.name}", part)
        part.replace(file)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether something is at a path or URL.

    Raises:
        CheckpointError: the URL cannot be reached.
    """
    url = url_of(path)
    if url is None:
        return Path(path).exists()
    try:
        with _as_os_errors():
            system, name = fsspec.url_to_fs(url)
            return bool(system.exists(name))
    except OSError as error:
        raise CheckpointError(f"{url} cannot be read ({error}): check address, connection and key") from None


def check_new(url: str) -> None:
    """Check that a folder can be made, before anything takes long.

    Raises:
        CheckpointError: something is there, or nothing can be written.
    """
    if staging_of(url).exists():
        raise CheckpointError(f"{staging_of(url)} could not be uploaded before: move it there yourself, or remove it")
    if exists(url):
        raise CheckpointError(f"{url} exists already: choose another output folder or remove it")
    try:
        with _as_os_errors():
            system, name = fsspec.url_to_fs(url)
            with suppress(NotImplementedError):
                system.makedirs(name, exist_ok=True)
            system.pipe_file(f"{name}/{_TRIED}", b"freebits")
            system.rm_file(f"{name}/{_TRIED}")
            _remove_if_empty(system, name)
    except OSError as error:
        raise CheckpointError(f"{url} cannot be written ({error})") from None


def staging_of(url: str) -> Path:
    """The folder in the user's cache that holds a result until it is uploaded."""
    return _cache() / sha256(url.encode()).hexdigest()[:16] / PurePosixPath(url).name


def upload(folder: Path, url: str) -> None:
    """Put a finished folder where it belongs, all of it or nothing, and remove it here.

    Raises:
        CheckpointError: that fails; the folder is left.
    """
    if exists(url):
        raise CheckpointError(f"{url} exists already: another run wrote it meanwhile; ours lies finished in {folder}")
    done: list[str] = []
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: (file.name in _LAST, file))
    try:
        with _as_os_errors():
            system, root = fsspec.url_to_fs(url)
            try:
                for file in files:
                    name = f"{root}/{file.relative_to(folder).as_posix()}"
                    with suppress(NotImplementedError):
                        system.makedirs(str(PurePosixPath(name).parent), exist_ok=True)
                    done.append(name)
                    system.put_file(str(file), name)
            except BaseException:
                for name in done:  # and nothing that is not ours
                    with suppress(Exception):
                        system.rm_file(name)
                _remove_if_empty(system, root)
                raise
    except OSError as error:
        raise CheckpointError(f"{url} could not be uploaded ({error}): it lies finished in {folder}") from None
    shutil.rmtree(folder.parent)
    mirror.cache_clear()


def _remove_if_empty(system: Any, name: str) -> None:
    """Remove a folder, where the file system has any, and nothing is in it."""
    with suppress(Exception):
        if not system.find(name):
            system.rmdir(name)


def _stand_in(system: Any, name: str, told: dict[str, Any], folder: Path, relative: str, url: str) -> None:
    """A copy of a small file, a hole for a large one; its time is another if the file is (see `Task`)."""
    parts = PurePosixPath(relative).parts
    if not parts or any(part in ("..", ".") or "\\" in part or part.startswith(".") for part in parts):
        return
    file = folder.joinpath(*parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    size = told.get("size")
    size = system.info(name)["size"] if size is None else size
    if _is_copied(file.name) and (size or 0) <= COPIED_BYTES:
        system.get_file(name, str(file))
    else:
        with file.open("wb") as hole:
            hole.truncate(size or 0)
        _mirrors[file] = f"{url}/{relative}"
    version = int(sha256(repr(_state(told)).encode()).hexdigest()[:12], 16)
    os.utime(file, ns=(version, version))


def _is_copied(name: str) -> bool:
    return any(PurePosixPath(name).match(pattern) for pattern in _COPIED)


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "freebits"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """The many kinds of error of the many file systems, as one."""
    try:
        yield
    except NotImplementedError:
        raise OSError("this kind of address cannot be written to") from None
    except Exception as error:
        finding = one_line(" ".join(str(error).split()), 160)
        raise OSError(finding or type(error).__name__) from None
