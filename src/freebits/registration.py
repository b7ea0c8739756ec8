"""Teach transformers' Auto classes our models when they are imported, without importing transformers for that.

`import freebits` is then quick for those who do not run models, and enough for those who do. The way is the import
system's own: a finder that steps aside once the module it waits for has been executed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_OURS = "freebits.huggingface"
_EARLY, _LATE = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"
"""Who asks for a configuration alone imports the first, who asks for a model both, the second being last to finish."""


def register_with_transformers() -> None:
    """Register our models now if the Auto classes are there, else as soon as they are."""
    if _LATE in sys.modules:
        importlib.import_module(_OURS)
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname not in (_EARLY, _LATE):
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
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
        early = module.__name__ == _EARLY
        if early:
            sys.meta_path.insert(0, self._finder)  # for the second
        self._loader.exec_module(module)
        if not early:
            importlib.import_module(_OURS)
        elif _LATE not in sys.modules:
            with suppress(ImportError):  # where transformers itself is in the middle of something: then the second
                importlib.import_module(_OURS)
