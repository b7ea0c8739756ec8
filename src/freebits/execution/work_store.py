"""Store finished pieces of work in a folder, so that an interrupted run can be resumed.

A piece is one call of a function with one item. A stage is a named sequence of pieces that call the same function. To
store a piece is to store its result.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from freebits.execution.executor import Executor
from freebits.execution.serialization import read, save

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkStore:
    """A folder of finished pieces. The file of a piece appears only after it is complete.

    Args:
        folder: the folder, which is created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def put(self, key: str, value: Any) -> None:
        """Store the result of a piece. `serialization.save` must accept the type of the result."""
        save(self._path(key), value)

    def get(self, key: str) -> Any:
        """Read the result of a finished piece.

        Raises:
            ValueError: the file of the piece is damaged.
            FileNotFoundError: the piece is not finished.
        """
        return read(self._path(key))

    def drop(self, pattern: str) -> None:
        """Delete the pieces whose keys match a pattern, in which `*` stands for any text."""
        for path in self.folder.glob(f"{_file_name(pattern, allowed='*')}.safetensors"):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{_file_name(key)}.safetensors"


class Work:
    """Runs stages of work with an executor, and stores finished pieces until `drop` deletes them.

    The key of a piece in the store is `STAGE-INDEX`. Indices count the pieces of a stage from 0.

    Args:
        executor: the executor that runs the pieces.
        store: the store of finished pieces; if None, nothing is stored.
    """

    def __init__(self, executor: Executor, store: WorkStore | None = None) -> None:
        self._executor = executor
        self._store = store

    @property
    def executor(self) -> Executor:
        """The executor, for work whose results are not stored."""
        return self._executor

    @property
    def store(self) -> WorkStore:
        """The store.

        Raises:
            LookupError: there is no store.
        """
        if self._store is None:
            raise LookupError("this work has no store")
        return self._store

    def map(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results of a stage in order. Read the finished pieces from the store; run and store all others.

        `function`, items and results must be picklable, because a piece may run in another process.
        """
        if self._store is None:
            return self._executor.map(function, items)
        return self._executor.map(partial(_run_or_read, self._store, stage, function), enumerate(items))

    def map_large(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Do the same as `map` for items so large that a process should run only one item at a time."""
        if self._store is None:
            return self._executor.map_large(function, items)
        return self._executor.map_large(partial(_run_or_read, self._store, stage, function), enumerate(items))

    def once(self, stage: str, function: Callable[[], Result]) -> Result:
        """Return the result of a stage with one piece. If the piece is not finished, run the piece in this process."""
        if self._store is None:
            return function()
        return _run_or_read(self._store, stage, lambda _: function(), (0, None))

    def result(self, stage: str) -> Any:
        """Return the result of a finished stage with one piece.

        Raises:
            LookupError: the stage is not finished.
        """
        if not self.has(stage):
            raise LookupError(f"{stage} is not finished")
        return self.store.get(f"{stage}-0")

    def has(self, stage: str) -> bool:
        """Return whether a stage with one piece is finished."""
        return self._store is not None and f"{stage}-0" in self._store

    def drop(self, *stages: str) -> None:
        """Delete the stored results of stages."""
        for stage in stages if self._store is not None else ():
            self.store.drop(f"{stage}-*")


def _run_or_read(store: WorkStore, stage: str, function: Callable[[Any], Any], numbered_item: tuple[int, Any]) -> Any:
    """Read the result of a piece from the store, or run the piece and store its result."""
    number, item = numbered_item
    key = f"{stage}-{number}"
    if key in store:
        try:
            return store.get(key)
        except ValueError:  # the file is damaged: run the piece again
            pass
    result = function(item)
    store.put(key, result)
    return result


def _file_name(key: str, allowed: str = "") -> str:
    return re.sub(rf"[^A-Za-z0-9_{re.escape(allowed)}-]", "_", key)
