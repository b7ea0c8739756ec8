"""Read and write remote folders, at URLs that fsspec supports (`s3://`, `gs://`, `hf://`, `https://`, …).

To read a remote folder, freebits creates a local mirror. The mirror contains a copy of each small auxiliary file, and a
sparse file without content, but of the same size, for each other file. The weights are read from the URL by range. To
write a remote folder, freebits writes a local folder first and then uploads it.
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

from freebits.errors import CheckpointError, reason_of
from freebits.limits import COPIED_BYTES
from freebits.types import Bytes

_COPIED = ("*.json", "*.md", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
"""Names of the files that a mirror contains as copies, unless they are large."""
_PROBE = ".freebits"
"""The name of a file that is written to test whether a remote folder is writable."""
_UPLOADED_LAST = ("config.json",)
"""Files that are uploaded last, so that readers do not take an incomplete folder for a checkpoint."""
_VERSION_KEYS = ("ETag", "etag", "LastModified", "mtime", "created", "generation", "commit_hash", "blob_id")
"""The keys under which file systems report the version of a file."""
_mirrors: dict[Path, str] = {}
"""Path of a mirror, or of a sparse file in a mirror → URL."""


class Readable(Protocol):
    """A file that can be read by range."""

    @property
    def size(self) -> int:
        """Number of bytes."""

    @property
    def state(self) -> tuple[object, ...]:
        """Values that change when the file is replaced or changed, as far as the file system reports changes."""

    def read(self, start: int, n_bytes: int) -> Bytes:
        """Read `n_bytes` from `start` on.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file has fewer bytes.
        """


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL. Implements `Readable`."""

    url: str
    size: int = field(init=False)
    state: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        with _as_os_errors():
            system, name = fsspec.url_to_fs(self.url)
            info = system.info(name)
        object.__setattr__(self, "size", int(info.get("size") or 0))
        object.__setattr__(self, "state", _state(info))

    def read(self, start: int, n_bytes: int) -> Bytes:
        """Read `n_bytes` from `start` on."""
        if not n_bytes:
            return np.empty(0, np.uint8)
        with _as_os_errors():
            system, name = fsspec.url_to_fs(self.url)
            with system.open(name, "rb", cache_type="none") as file:  # no read-ahead
                file.seek(start)
                data = file.read(n_bytes)
        if len(data) != n_bytes:
            raise ValueError(f"the server sent {len(data)} bytes instead of {n_bytes}")
        return np.frombuffer(bytearray(data), np.uint8)


def _state(info: dict[str, Any]) -> tuple[object, ...]:
    return info.get("size"), *(str(info.get(key)) for key in _VERSION_KEYS)


def url_of(path: str | os.PathLike[str]) -> str | None:
    """Return a path as a URL, or None if it is not a URL. Accept `Path` objects, which drop one slash of `://`."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?=[^/])", os.fspath(path))
    if not match or match[1] not in fsspec.available_protocols():
        return None
    return f"{match[1]}://{os.fspath(path)[match.end() :].rstrip('/')}"


@cache
def mirror(url: str) -> Path:
    """Create a local mirror of a remote folder. The mirror is removed when this process exits.

    Until the next upload, further calls with the same URL return the same mirror.

    Raises:
        CheckpointError: the folder has no config, or cannot be reached.
    """
    scratch = Path(tempfile.mkdtemp(prefix="mirror-", dir=_cache()))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    folder = scratch / PurePosixPath(url).name
    folder.mkdir()
    try:
        with _as_os_errors():
            system, root = fsspec.url_to_fs(url)
            files = system.find(root, detail=True)
            if not any(name.endswith("config.json") for name in files):
                raise FileNotFoundError("there is no config.json")
            for name, info in sorted(files.items()):
                _mirror_file(system, name, info, folder, name[len(root) :].strip("/"), url)
    except OSError as error:
        raise CheckpointError(
            f"{url} cannot be read ({error}): check the URL, the connection and the credentials"
        ) from None
    _mirrors[folder] = url
    return folder


def original(path: Path) -> str | None:
    """Return the URL of a mirror or of a sparse file in one; None for any other path."""
    return _mirrors.get(path)


def download(url: str, target: Path) -> None:
    """Download a file.

    Raises:
        CheckpointError: the download fails.
    """
    try:
        with _as_os_errors():
            system, name = fsspec.url_to_fs(url)
            system.get_file(name, str(target))
    except OSError as error:
        raise CheckpointError(
            f"{url} cannot be downloaded ({error}): check the URL, the connection and the credentials"
        ) from None


def fill(folder: Path) -> None:
    """Download the safetensors files of a mirror, so that other libraries can read them. Do nothing for other folders.

    Raises:
        CheckpointError: the download fails.
    """
    url = _mirrors.get(folder)
    if url is None:
        return
    for file in folder.glob("*.safetensors"):
        partial = file.with_suffix(".part")
        download(f"{url}/{file.name}", partial)
        partial.replace(file)


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether a path or URL exists.

    Raises:
        CheckpointError: the path is a URL that cannot be reached.
    """
    url = url_of(path)
    if url is None:
        return Path(path).exists()
    try:
        with _as_os_errors():
            system, name = fsspec.url_to_fs(url)
            return bool(system.exists(name))
    except OSError as error:
        raise CheckpointError(
            f"{url} cannot be read ({error}): check the URL, the connection and the credentials"
        ) from None


def check_new(url: str) -> None:
    """Check that a URL does not exist yet and is writable, before the command starts its work.

    Raises:
        CheckpointError: the URL exists or cannot be written, or an earlier result could not be uploaded to it.
    """
    if staging_of(url).exists():
        raise CheckpointError(
            f"{staging_of(url)} is a finished result whose upload to {url} failed: upload or remove the folder"
        )
    if exists(url):
        raise CheckpointError(f"{url} exists already: remove it or choose another output folder")
    try:
        with _as_os_errors():
            system, name = fsspec.url_to_fs(url)
            with suppress(NotImplementedError):
                system.makedirs(name, exist_ok=True)
            system.pipe_file(f"{name}/{_PROBE}", b"freebits")
            system.rm_file(f"{name}/{_PROBE}")
            _remove_if_empty(system, name)
    except OSError as error:
        raise CheckpointError(
            f"{url} cannot be written ({error}): check the URL, the connection and the credentials"
        ) from None


def staging_of(url: str) -> Path:
    """Return the folder in the user's cache that contains the result for a URL until the result is uploaded."""
    return _cache() / sha256(url.encode()).hexdigest()[:16] / PurePosixPath(url).name


def upload(folder: Path, url: str) -> None:
    """Upload a finished folder, and remove the local copy. If the upload fails, remove the files that were uploaded.

    Raises:
        CheckpointError: the URL exists, or the upload fails. In both cases, the local folder stays.
    """
    if exists(url):
        raise CheckpointError(
            f"{url} exists already, because another run wrote it in the meantime: upload {folder} to another URL"
        )
    uploaded: list[str] = []
    files = [file for file in folder.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (file.name in _UPLOADED_LAST, file))
    try:
        with _as_os_errors():
            system, root = fsspec.url_to_fs(url)
            try:
                for file in files:
                    name = f"{root}/{file.relative_to(folder).as_posix()}"
                    with suppress(NotImplementedError):
                        system.makedirs(str(PurePosixPath(name).parent), exist_ok=True)
                    uploaded.append(name)
                    system.put_file(str(file), name)
            except BaseException:
                for name in uploaded:  # not the whole folder, because another run may write to it
                    with suppress(Exception):
                        system.rm_file(name)
                _remove_if_empty(system, root)
                raise
    except OSError as error:
        raise CheckpointError(
            f"the upload to {url} failed ({error}): upload the finished folder yourself from {folder}"
        ) from None
    shutil.rmtree(folder.parent)
    mirror.cache_clear()


def _remove_if_empty(system: Any, name: str) -> None:
    """Remove a folder if it is empty and the file system has folders."""
    with suppress(Exception):
        if not system.find(name):
            system.rmdir(name)


def _mirror_file(system: Any, name: str, info: dict[str, Any], folder: Path, relative: str, url: str) -> None:
    """Copy a remote file into a mirror if it is small and matches `_COPIED`; otherwise create a sparse file.

    Hidden files are skipped. The modification time encodes the version of the remote file, because `Task` compares
    modification times.
    """
    parts = PurePosixPath(relative).parts
    if not parts or any(part in ("..", ".") or "\\" in part or part.startswith(".") for part in parts):
        return
    file = folder.joinpath(*parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    size = info.get("size")
    size = system.info(name)["size"] if size is None else size
    if _is_copied(file.name) and (size or 0) <= COPIED_BYTES:
        system.get_file(name, str(file))
    else:
        with file.open("wb") as sparse:
            sparse.truncate(size or 0)
        _mirrors[file] = f"{url}/{relative}"
    version = int(sha256(repr(_state(info)).encode()).hexdigest()[:12], 16)
    os.utime(file, ns=(version, version))


def _is_copied(name: str) -> bool:
    return any(PurePosixPath(name).match(pattern) for pattern in _COPIED)


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "freebits"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Convert the exceptions of all file systems to `OSError`."""
    try:
        yield
    except NotImplementedError:
        raise OSError("the file system does not support this operation") from None
    except Exception as error:
        reason = reason_of(error, 160)
        raise OSError(reason or type(error).__name__) from None
