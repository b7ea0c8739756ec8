"""Teach transformers' Auto classes our models when they are imported, without importing transformers for that.

`import freebits` is then quick for those who do not run models, and enough for those who do. The way is the import
system's own: until our models are registered, a finder has us told whenever a module of transformers has been executed.
"""

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_OURS = "freebits.integrations.auto_classes"
_AUTO = "transformers.models.auto.configuration_auto"
"""What everyone imports who looks a model up by its type."""


def register_with_transformers() -> None:
    """Register our models now if the Auto classes are there, else as soon as they are."""
    if _AUTO in sys.modules and not _is_busy(""):
        importlib.import_module(_OURS)
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds transformers' modules as everyone does, and has their loader tell when they have been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if self._finder in sys.meta_path and _AUTO in sys.modules and not _is_busy(module.__name__):
            with suppress(ValueError):  # another thread was faster
                sys.meta_path.remove(self._finder)
            importlib.import_module(_OURS)

    def __getattr__(self, name: str) -> object:  # what else a loader can do, such as read its module's source
        return getattr(self._loader, name)


def _is_busy(finished: str) -> bool:
    """Whether transformers is in the middle of importing something else, which ours would then find half done."""
    theirs = [(name, module) for name, module in list(sys.modules.items()) if name.startswith("transformers.")]
    specs = [getattr(module, "__spec__", None) for name, module in theirs if name != finished]
    return any(getattr(spec, "_initializing", False) for spec in specs)
