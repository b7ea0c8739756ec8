"""Finished pieces of work in a folder, so that a run that was stopped does not do them twice."""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from freebits.execution.executor import Executor
from freebits.execution.stored_values import read, save

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkStore:
    """A folder of finished pieces, each in a file that exists once it is whole.

    Args:
        folder: created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def put(self, key: str, value: Any) -> None:
        """Store a finished piece; see `saved.save` for what it may be."""
        save(self._path(key), value)

    def get(self, key: str) -> Any:
        """A finished piece.

        Raises:
            ValueError: it is damaged.
            FileNotFoundError: it is not finished.
        """
        return read(self._path(key))

    def drop(self, pattern: str) -> None:
        """Delete the pieces whose keys match a pattern of `glob`."""
        for path in self.folder.glob(f"{_file_name(pattern, allowed='*')}.safetensors"):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{_file_name(key)}.safetensors"


class Work:
    """Pieces of work and their results: an executor runs them, a store keeps what is finished.

    This is the only place that makes keys of finished pieces: `STAGE-NUMBER`. A stage's pieces are kept until `drop`.

    Args:
        executor: runs pieces.
        store: keeps finished pieces; without one nothing is kept.
    """

    def __init__(self, executor: Executor, store: WorkStore | None = None) -> None:
        self._executor = executor
        self._store = store

    @property
    def executor(self) -> Executor:
        """Who runs pieces, for results that are not kept."""
        return self._executor

    @property
    def store(self) -> WorkStore:
        """The store.

        Raises:
            LookupError: there is none.
        """
        if self._store is None:
            raise LookupError("this work has no store")
        return self._store

    def map(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results of a stage, in order; finished pieces are read, the others are run and kept.

        A piece may run in another process, so `function`, items and results must be picklable there.
        """
        if self._store is None:
            return self._executor.map(function, items)
        return self._executor.map(partial(_kept, self._store, stage, function), enumerate(items))

    def map_large(self, stage: str, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The same for items each of which fills a machine."""
        if self._store is None:
            return self._executor.map_large(function, items)
        return self._executor.map_large(partial(_kept, self._store, stage, function), enumerate(items))

    def once(self, stage: str, function: Callable[[], Result]) -> Result:
        """The one result of a stage, found in this process unless it is finished."""
        if self._store is None:
            return function()
        return _kept(self._store, stage, lambda _: function(), (0, None))

    def result(self, stage: str) -> Any:
        """The one result of a stage that is finished.

        Raises:
            LookupError: it is not.
        """
        if not self.has(stage):
            raise LookupError(f"{stage} is not finished")
        return self.store.get(f"{stage}-0")

    def has(self, stage: str) -> bool:
        """Whether the one result of a stage is finished."""
        return self._store is not None and f"{stage}-0" in self._store

    def drop(self, *stages: str) -> None:
        """Forget the results of stages that nobody needs any more."""
        for stage in stages if self._store is not None else ():
            self.store.drop(f"{stage}-*")


def _kept(store: WorkStore, stage: str, function: Callable[[Any], Any], numbered: tuple[int, Any]) -> Any:
    """The result of a piece: from the store, or run and stored."""
    number, item = numbered
    key = f"{stage}-{number}"
    if key in store:
        try:
            return store.get(key)
        except ValueError:  # damaged: it is done again
            pass
    result = function(item)
    store.put(key, result)
    return result


def _file_name(key: str, allowed: str = "") -> str:
    return re.sub(rf"[^A-Za-z0-9_{re.escape(allowed)}-]", "_", key)
