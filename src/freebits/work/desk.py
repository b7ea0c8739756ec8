"""Finished pieces of work in a folder, so that nobody does them twice: after a stop, or on many machines."""

import re
import time
from pathlib import Path
from typing import Any

from freebits.work.saved import read, save

_WAIT = 0.05
"""Seconds between two looks at a folder that others write to."""


class Desk:
    """A folder of finished pieces, each in a file that is there once it is whole.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, key: str) -> bool:
        """Whether a piece is finished and whole."""
        return self._path(key).exists()

    def put(self, key: str, value: Any) -> None:
        """Lay down a finished piece; see `saved.save` for what it may be."""
        save(self._path(key), value)

    def get(self, key: str) -> Any:
        """A finished piece.

        Raises:
            ValueError: it is damaged.
            FileNotFoundError: it is not finished.
        """
        return read(self._path(key))

    def wait(self, key: str) -> Any:
        """A piece that somebody else finishes.

        Raises:
            Cleared: the desk is gone, as all is done.
        """
        while not self.has(key):
            if not self.folder.exists():
                raise Cleared
            time.sleep(_WAIT)
        return self.get(key)

    def drop(self, pattern: str) -> None:
        """Throw away the pieces whose keys match a pattern of `glob`."""
        for path in self.folder.glob(f"{_name(pattern, kept='*')}.safetensors"):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{_name(key)}.safetensors"


class Cleared(Exception):  # noqa: N818  (no error)
    """A desk is gone, as whoever leads has finished."""


def _name(key: str, kept: str = "") -> str:
    return re.sub(rf"[^A-Za-z0-9_{re.escape(kept)}-]", "_", key)
