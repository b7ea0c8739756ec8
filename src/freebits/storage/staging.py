"""Create output folders. A folder gets its name only when it is complete; if the command fails, there is no folder."""

import logging
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from freebits.errors import CheckpointError, one_line
from freebits.storage.remote import check_new, staging_of, upload, url_of
from freebits.storage.resumption import UNFINISHED, Task

_log = logging.getLogger(__name__)
_MAX_NAME_BYTES = 180
_being_written: set[Path] = set()
"""Staging directories that this process is writing."""


@contextmanager
def new_directory(path: str | os.PathLike[str], task: Task | None = None) -> Iterator[Path]:
    """Create the complete folder `path` when the block ends. If the block raises an error, do not create the folder.

    The block writes to a staging directory next to `path`. The name of the staging directory identifies the machine
    and the process. Older staging directories for `path` are removed if their process ran on this machine and has
    ended; on Windows, freebits cannot find this out and lets them stay. The new staging directory is flushed to the
    disk (`fsync`) before it is renamed to `path`.

    Args:
        path: a folder, or a URL. For a URL, the staging directory is in the user's cache, and the folder is uploaded at
            the end.
        task: the command; None if it cannot be resumed. If a stopped run of the same task left a staging directory,
            this run takes the directory over. If this run is stopped (Ctrl-C or a signal) after it has finished a
            piece, its staging directory stays.

    Raises:
        CheckpointError: `path` exists or cannot be written, or the upload fails.
    """
    url = url_of(path)
    target = Path(path).absolute() if url is None else staging_of(url)
    if not target.name:
        raise CheckpointError(f"{path} exists already: choose another output folder")
    if url:
        check_new(url)
    staging = _staging_path(target)
    created = _create_or_take_over(path, target, staging, task)
    keep = False
    try:
        _being_written.add(staging)
        yield staging
        shutil.rmtree(staging / UNFINISHED, ignore_errors=True)
        _publish(staging, target)
        if url:
            upload(target, url)
        keep = True
    except (KeyboardInterrupt, SystemExit):
        keep = task is not None and any((staging / UNFINISHED).rglob("*.safetensors"))
        if keep:
            _log.warning("freebits: the run was stopped; rerun the command to resume it from %s", one_line(staging))
        raise
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(staging)):
            raise  # the block could not access a file outside the staging directory
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}): check the free space and the permissions"
        ) from error
    finally:
        _being_written.discard(staging)
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
            _remove_empty(created)


def _create_or_take_over(path: str | os.PathLike[str], target: Path, staging: Path, task: Task | None) -> list[Path]:
    """Create a staging directory or take over the one of a stopped run. Return the parent folders that were created."""
    created: list[Path] = []
    try:
        if target.exists() or target.is_symlink():
            raise CheckpointError(f"{path} exists already: remove it or choose another output folder")
        leftover = _leftover_staging(target, task)
        for parent in reversed([parent for parent in target.parents if not parent.exists()]):
            parent.mkdir()
            created.append(parent)
        if leftover:
            leftover.rename(staging)
            _delete_all_but_pieces(staging)
            _log.warning("freebits: resuming the stopped run in %s", one_line(staging))
        else:
            staging.mkdir()
    except (OSError, ValueError) as error:
        _remove_empty(created)
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be created ({reason}): choose another output folder") from None
    return created


def _staging_path(target: Path) -> Path:
    """Return a new name for a staging directory of this process."""
    return target.with_name(f"{_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}.staging")


def _prefix(target: Path) -> str:
    """Return the prefix of the names of staging directories that this machine creates for `target`."""
    return f"{_hidden_name(target)}.{zlib.crc32(platform.node().encode()):08x}-"


def _hidden_name(target: Path) -> str:
    """Return a hidden file name. Cut the name to leave room for a suffix, because names have at most 255 bytes."""
    return "." + target.name.encode(errors="replace")[:_MAX_NAME_BYTES].decode(errors="ignore")


def _publish(staging: Path, target: Path) -> None:
    """Flush a staging directory to the disk, then rename it to `target`."""
    for folder, _, files in os.walk(staging):
        for file in files:
            _sync(Path(folder) / file)
        _sync(Path(folder))
    try:
        staging.rename(target)
    except OSError:
        if target.exists():
            raise CheckpointError(
                f"{target} exists already, because another run wrote it in the meantime: choose another output folder"
            ) from None
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():  # only POSIX systems can open folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leftover_staging(target: Path, task: Task | None) -> Path | None:
    """Return a staging directory for `target` from a stopped run of the same task, or None if there is none.

    Remove all other staging directories for `target` whose process has ended, and log a warning for each.
    """
    pattern = re.escape(_prefix(target)) + r"(\d+)-[0-9a-f]{8}\.staging"
    resumable = None
    for staging in target.parent.iterdir() if target.parent.is_dir() else ():
        match = re.fullmatch(pattern, staging.name)
        if not match or staging in _being_written or not staging.is_dir() or staging.is_symlink():
            continue
        if int(match[1]) != os.getpid() and _alive(int(match[1])):
            continue
        if resumable is None and task is not None and task.resume and task.began(staging):
            resumable = staging
            continue
        shutil.rmtree(staging, ignore_errors=True)
        _log.warning("freebits: removed the unfinished output of an earlier run: %s", one_line(staging))
    return resumable


def _delete_all_but_pieces(staging: Path) -> None:
    """Delete everything in a staging directory except the finished pieces."""
    for path in staging.iterdir():
        if path.name != UNFINISHED:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _alive(process_id: int) -> bool:
    if os.name != "posix":  # on Windows, signal 0 would end the process
        return True
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # the process belongs to another user
        return True
    return True


def _remove_empty(folders: list[Path]) -> None:
    """Remove empty folders, innermost first. Stop at the first folder that is not empty."""
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:
            return
