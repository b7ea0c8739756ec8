"""A folder that appears complete or not at all."""

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

_log = logging.getLogger(__name__)
_LONGEST_NAME = 200


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears at `path` complete when the block ends, and not at all if it raises.

    What is written in the block goes to a draft beside it, whose name tells machine and process; drafts that a killed
    process of this machine left there are removed. Before the draft gets its name, all of it is on the disk (`fsync`).

    Raises:
        CheckpointError: something exists at `path`, or nothing can be written beside it.
    """
    target = Path(path).absolute()
    if not target.name:
        raise CheckpointError(f"{path} exists already: choose another output folder")
    made: list[Path] = []
    draft = _draft_path(target)
    try:
        if target.exists() or target.is_symlink():
            raise CheckpointError(f"{path} exists already: choose another output folder or remove it")
        _clear_drafts(target)
        for parent in reversed([parent for parent in target.parents if not parent.exists()]):
            parent.mkdir()
            made.append(parent)
        draft.mkdir()
    except (OSError, ValueError) as error:
        _remove_empty(made)
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be created: {reason}") from None
    published = False
    try:
        yield draft
        _publish(draft, target)
        published = True
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(draft)):
            raise  # it is not the output that failed
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        if not published:
            shutil.rmtree(draft, ignore_errors=True)
            _remove_empty(made)


def _draft_path(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}.draft")


def _prefix(target: Path) -> str:
    shown = target.name.encode(errors="replace")[:_LONGEST_NAME].decode(errors="ignore")  # names have at most 255 bytes
    return f".{shown}.{zlib.crc32(platform.node().encode()):08x}-"


def _publish(draft: Path, target: Path) -> None:
    """Give a draft its name once all of it is on the disk."""
    for folder, _, files in os.walk(draft):
        for file in files:
            _sync(Path(folder) / file)
        _sync(Path(folder))
    try:
        draft.rename(target)
    except OSError:
        if target.exists():
            raise CheckpointError(f"{target} exists already: another run wrote it meanwhile") from None
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():  # only POSIX opens folders
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear_drafts(target: Path) -> None:
    """Remove the drafts of `target` whose process is gone, and say so."""
    pattern = re.escape(_prefix(target)) + r"(\d+)-[0-9a-f]{8}\.draft"
    for draft in target.parent.iterdir() if target.parent.is_dir() else ():
        found = re.fullmatch(pattern, draft.name)
        if found and draft.is_dir() and not draft.is_symlink() and not _alive(int(found[1])):
            shutil.rmtree(draft, ignore_errors=True)
            _log.warning("freebits: removed what a killed run left: %s", one_line(draft))


def _alive(process: int) -> bool:
    if os.name != "posix":  # there a signal of 0 would end the process
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for nothing, innermost first, as far as they are still empty."""
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:
            return
