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

from freebits.checkpoint.drafts import UNFINISHED, Task
from freebits.checkpoint.remote import check_new, draft_of, upload, url_of
from freebits.errors import CheckpointError, UsageError, one_line
from freebits.work import Cleared

_log = logging.getLogger(__name__)
_LONGEST_NAME = 180
_open: set[Path] = set()
"""Drafts that this process is writing."""


@contextmanager
def new_directory(path: str | os.PathLike[str], task: Task | None = None) -> Iterator[Path]:
    """A folder that appears at `path` complete when the block ends, and not at all if it raises.

    What is written in the block goes to a draft beside it, whose name tells machine and process; drafts that a killed
    process of this machine left there are removed. Before the draft gets its name, all of it is on the disk (`fsync`).

    Args:
        path: the folder, or a URL: then the draft lies in the user's cache until it is finished, and is uploaded.
        task: what is done. A draft that a stopped run of the same task left is gone on with, and one that is stopped
            (by Ctrl-C, or a signal that ends it) stays, if a piece of it is finished. Processes that share a task share
            a draft; the one that leads gives it its name.

    Raises:
        CheckpointError: something exists at `path`, or nothing can be written beside it.
    """
    url = url_of(path)
    target = Path(path).absolute() if url is None else draft_of(url)
    if not target.name:
        raise CheckpointError(f"{path} exists already: choose another output folder")
    shared = task is not None and task.team.shared
    if url:
        if shared:
            raise UsageError(f"{path}: processes of a --world share a folder, not an address: upload it afterwards")
        check_new(url)
    draft = _draft_path(target, task if shared else None)
    made = _begin(path, target, draft, task)
    done = False
    try:
        _open.add(draft)
        yield draft
        if task is None or task.team.leads:
            shutil.rmtree(draft / UNFINISHED, ignore_errors=True)
            _publish(draft, target)
            if url:
                upload(target, url)
        done = True
    except Cleared:  # whoever leads needs nothing more of us
        done = True
    except (KeyboardInterrupt, SystemExit):
        done = task is not None and any((draft / UNFINISHED).rglob("*.safetensors"))
        if done:
            _log.warning("freebits: stopped: the same command goes on from here, with what lies in %s", one_line(draft))
        raise
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(draft)):
            raise  # it is not the output that failed
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        _open.discard(draft)
        if not done and not shared:
            shutil.rmtree(draft, ignore_errors=True)
            _remove_empty(made)


def _begin(path: str | os.PathLike[str], target: Path, draft: Path, task: Task | None) -> list[Path]:
    """Make a draft, or take over one that was left; the parents that had to be made."""
    made: list[Path] = []
    try:
        if target.exists() or target.is_symlink():
            raise CheckpointError(f"{path} exists already: choose another output folder or remove it")
        left = _left_draft(target, task)
        for parent in reversed([parent for parent in target.parents if not parent.exists()]):
            parent.mkdir(exist_ok=task is not None and task.team.shared)
            made.append(parent)
        if left:
            left.rename(draft)
            _clear_but_unfinished(draft)
            _log.warning("freebits: going on with what a run left that was stopped: %s", one_line(left))
        else:
            draft.mkdir(exist_ok=task is not None and task.team.shared)
    except (OSError, ValueError) as error:
        _remove_empty(made)
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be created: {reason}") from None
    return made


def _draft_path(target: Path, task: Task | None) -> Path:
    """Of this process alone, or of all that share a task."""
    if task is not None:
        return target.with_name(f"{_hidden(target)}.{task.name}.shared.draft")
    return target.with_name(f"{_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}.draft")


def _prefix(target: Path) -> str:
    """How drafts of this machine begin."""
    return f"{_hidden(target)}.{zlib.crc32(platform.node().encode()):08x}-"


def _hidden(target: Path) -> str:
    """A hidden name that leaves room for more: names have at most 255 bytes."""
    return "." + target.name.encode(errors="replace")[:_LONGEST_NAME].decode(errors="ignore")


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


def _left_draft(target: Path, task: Task | None) -> Path | None:
    """A draft of the task whose process is gone; others of `target` are removed, which is said."""
    pattern = re.escape(_prefix(target)) + r"(\d+)-[0-9a-f]{8}\.draft"
    found = None
    for draft in target.parent.iterdir() if target.parent.is_dir() else ():
        match = re.fullmatch(pattern, draft.name)
        if not match or draft in _open or not draft.is_dir() or draft.is_symlink():
            continue
        if int(match[1]) != os.getpid() and _alive(int(match[1])):
            continue
        if found is None and task is not None and task.resume and not task.team.shared and task.began(draft):
            found = draft
            continue
        shutil.rmtree(draft, ignore_errors=True)
        _log.warning("freebits: removed what a killed run left: %s", one_line(draft))
    return found


def _clear_but_unfinished(draft: Path) -> None:
    """Throw away what a stopped run had begun to put together."""
    for path in draft.iterdir():
        if path.name != UNFINISHED:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
