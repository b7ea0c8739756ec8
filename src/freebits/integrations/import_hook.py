"""Register freebits' models with transformers' Auto classes when transformers is imported, but not before.

Therefore `import freebits` is fast in programs that do not run models, and programs that run models need no other call.
A finder in Python's import system checks after each import of a module of transformers whether the models can be
registered.
"""

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRATION = "freebits.integrations.auto_classes"
_AUTO = "transformers.models.auto.configuration_auto"
"""The module that all Auto classes import."""


def register_with_transformers() -> None:
    """Register the models now if the Auto classes are already imported, otherwise as soon as they are imported."""
    if _AUTO in sys.modules and not _is_busy(""):
        importlib.import_module(_REGISTRATION)
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds modules of transformers as Python does, and wraps their loaders in `_Loader`."""

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
            with suppress(ValueError):  # another thread has removed the finder
                sys.meta_path.remove(self._finder)
            importlib.import_module(_REGISTRATION)

    def __getattr__(self, name: str) -> object:  # for other methods of the loader, such as `get_source`
        return getattr(self._loader, name)


def _is_busy(finished: str) -> bool:
    """Return whether a module of transformers other than `finished` is still being imported, and so is incomplete."""
    modules = [(name, module) for name, module in list(sys.modules.items()) if name.startswith("transformers.")]
    specs = [getattr(module, "__spec__", None) for name, module in modules if name != finished]
    return any(getattr(spec, "_initializing", False) for spec in specs)
