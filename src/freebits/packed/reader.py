"""Read a packed folder: a model's tensors by name, each decoded when it is asked for."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from freebits.codecs.integers import Integers, ScaledIntegers
from freebits.codecs.registry import CODES
from freebits.errors import CheckpointError
from freebits.execution.executor import Parallel
from freebits.limits import check_expansion
from freebits.models.families import SLICED_PREFIX
from freebits.models.layout import Layout
from freebits.models.table import Architecture
from freebits.packed.manifest import Manifest, digest, is_packed
from freebits.packed.recipe import Recipe, made_of
from freebits.storage.folder import ADAPTER, CONFIG, GGUF, Checkpoint, existing_folder, read_json
from freebits.storage.weights import Entry, WeightsFile, parse_header
from freebits.types import TensorSpec

MODEL = "model"
"""Key of the packed `config.json` under which the model's own config stands."""


class PackedFolder:
    """A packed folder, everything validated that its headers tell. Implements `Source`.

    Attributes:
        manifest: what the folder says of itself.
        files: the weights files.
        stored: the stored tensors, in the order of the files.
        specs: the tensors that it holds; with codec `none` those of other weights files, as `file/name`, too.
        config: the model's.

    Args:
        path: the folder.
        verify: check each stored tensor's digest when it is read.

    Raises:
        CheckpointError: the folder is not packed, or a file is missing, damaged or not what the manifest says; of a
            tensor that is noticed when it is read.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.path = existing_folder(path)
        self.manifest = Manifest.read(self.path)
        self._verify = verify
        self.files = [WeightsFile(self.path / file) for file in self.manifest.files]
        self._files = {name: file for file in self.files for name in file.entries}
        self.stored = {name: file.entries[name].spec for name, file in self._files.items()}
        if sum(len(file.entries) for file in self.files) > len(self.stored):
            raise self._damaged("two of its files hold a tensor of one name")
        for name in sorted(self.stored.keys() ^ self.manifest.digests.keys()):
            raise self._damaged(f"tensor {name} is in the manifest or in a file, but not in both")
        try:
            self.specs: Mapping[str, TensorSpec] = made_of(self.stored, self.manifest.recipes)
        except ValueError as error:
            raise self._damaged(str(error)) from None
        self._recipes = {name: recipe for recipe in self.manifest.recipes for name in recipe.makes}
        self._last: tuple[str, dict[str, Tensor]] = "", {}
        self.config = self._config()
        if str(self.config.get("model_type", "")).startswith(SLICED_PREFIX) and not self.manifest.exact:
            architecture = Architecture.of(self.config, len(self.specs))
            layout = Layout.of(self.config, architecture)
            layout.check({name: spec.shape for name, spec in self.specs.items()}, architecture)
            self._check_shortcuts(layout, architecture)
        headers = (file for file in self.manifest.originals if file.endswith((".safetensors", f".{GGUF}")))
        self.originals = {file: self._entries(file) for file in headers}
        listed = {name for entries in self.originals.values() for name in entries}
        if self.manifest.exact and listed != self.specs.keys():
            raise self._damaged(f"{min(self.specs.keys() ^ listed)} is in no header of an original file")
        """With codec `none`, each original file's tensors by the names they have here."""

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(file.path for file in self.files)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, decoded from just what it takes."""
        if name not in self.specs:
            raise CheckpointError(f"tensor {name} is missing in {self.path}: the checkpoint is incomplete")
        root, (last, made) = self._root(name), self._last
        if last != root:
            made = {}
        tensor = self._decoded(name, made)
        made.pop(name, None)
        self._last = root, made  # for those that were decoded with it, which are often asked for next
        return tensor

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Tensors that are decoded in one go, together."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self._root(name), []).append(name)
        return list(groups.values())

    def _root(self, name: str) -> str:
        """The first of the stored tensors that a tensor is made of."""
        while recipe := self._recipes.get(name):
            name = next(iter(recipe.takes.values()), "")
        return name

    def decoded(self, names: Iterable[str], parallel: Parallel = Parallel()) -> Iterator[dict[str, Tensor]]:
        """The named tensors in their order, one group after the other; several groups are decoded at once."""
        groups = self.groups(names)
        together = (sum(self.specs[name].n_bytes for name in names) for names in groups if len(names) > 1)
        with parallel.executor(max(together, default=0)) as executor:  # a single tensor needs no linear algebra
            yield from executor.map(self._decoded_group, groups)

    def _decoded_group(self, names: list[str]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        return {name: self._decoded(name, made) for name in names}

    def model_tensors(self, parallel: Parallel = Parallel()) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the model, without those of other weights files."""
        for tensors in self.decoded(self.model_specs, parallel):
            yield from tensors.items()

    @property
    def model_specs(self) -> dict[str, TensorSpec]:
        """The model's tensors; not those of other weights beside it."""
        auxiliary = {name for file in self.manifest.auxiliary for name in self.originals.get(file, {})}
        return {name: spec for name, spec in self.specs.items() if name not in auxiliary}

    def check(self, parallel: Parallel = Parallel()) -> None:
        """Read and decode everything.

        Raises:
            CheckpointError: a tensor is damaged.
        """
        for _ in self.decoded(self.specs, parallel):
            pass

    def _decoded(self, name: str, made: dict[str, Tensor]) -> Tensor:
        """A tensor, stored or made; `made` keeps what a recipe makes besides."""
        if name in made:
            return made[name]
        recipe = self._recipes.get(name)
        if recipe is None:
            return self.stored_tensor(name)
        made |= self._follow(recipe, made)
        return made[name]

    def _follow(self, recipe: Recipe, made: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = {part: self._decoded(name, made) for part, name in recipe.takes.items()}
        try:
            tensors = CODES[recipe.code].decode(parts, list(recipe.makes.values()), recipe.params)
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError, MemoryError) as error:
            raise self._damaged(f"{next(iter(recipe.makes))} cannot be decoded ({error})") from None
        return dict(zip(recipe.makes, tensors, strict=True))

    def matrices(self, recipe: Recipe, code: Integers) -> list[ScaledIntegers]:
        """What a recipe of code `integers` makes, still as integers."""
        parts = {part: self._decoded(name, {}) for part, name in recipe.takes.items()}
        try:
            return list(code.scaled_integers(parts, list(recipe.makes.values()), recipe.params))
        except (ValueError, KeyError) as error:
            raise self._damaged(f"{next(iter(recipe.makes))} cannot be decoded ({error})") from None

    def stored_tensor(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            CheckpointError: it is damaged.
        """
        data = self._files[name].read(name)
        if self._verify and digest(self.stored[name], data) != self.manifest.digests[name]:
            raise self._damaged(f"{name} does not match its digest")
        return self.stored[name].view(data)

    def _config(self) -> dict[str, Any]:
        if not self.manifest.exact:
            config = read_json(self.path / CONFIG).get(MODEL)
        else:
            try:
                originals = self.manifest.originals
                config = json.loads(originals[CONFIG if CONFIG in originals else ADAPTER])
            except (ValueError, RecursionError) as error:
                raise self._damaged(f"its {CONFIG} is no JSON ({error})") from None
        if not isinstance(config, dict):
            raise self._damaged(f"its {CONFIG} tells of no model")
        return config

    def _entries(self, file: str) -> dict[str, Entry]:
        try:
            entries = parse_header(self.manifest.originals[file])
        except (KeyError, ValueError) as error:
            raise self._damaged(f"the header of {file} ({error})") from None
        prefix = f"{file}/" if file in self.manifest.auxiliary else ""
        named = {prefix + entry.name: entry for entry in entries}
        for name, entry in named.items():
            if self.specs.get(name) != entry.spec:
                raise self._damaged(f"{name} is not what the header of {file} says")
        return named

    def _check_shortcuts(self, layout: Layout, architecture: Architecture) -> None:
        """Check what factors, which may be thin, stand for."""
        widths = layout.widths or ()
        thin = [sub.site for sub in architecture.sublayers if layout.rank(sub.site) is not None]
        try:
            check_expansion(
                sum(spec.n_bytes for spec in self.stored.values()),
                sum(2 * widths[site - 1] * widths[site] for site in thin),
            )
        except ValueError as error:
            raise self._damaged(f"its shortcuts: {error}") from None

    def _damaged(self, finding: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {finding}; download it again")


def opened(path: str | os.PathLike[str]) -> Checkpoint | PackedFolder:
    """The checkpoint in a folder, packed or not.

    Raises:
        CheckpointError: the folder is no sound checkpoint.
    """
    return PackedFolder(path) if is_packed(path) else Checkpoint(path)
