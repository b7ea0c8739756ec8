"""Read a packed folder, and decode the tensors of its model on request."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from freebits.codecs.base import Check
from freebits.codecs.integers import IntegerChunk, Integers
from freebits.codecs.registry import CODES
from freebits.errors import CheckpointError
from freebits.execution.executor import Parallel
from freebits.limits import BASES, check_expansion
from freebits.models.architecture import Architecture
from freebits.models.families import SLICED_PREFIX
from freebits.models.layout import Layout
from freebits.packed.base import BASE_PATH
from freebits.packed.manifest import Manifest, digest, is_packed
from freebits.packed.recipe import Recipe, check_recipes
from freebits.storage.checkpoint import ADAPTER, CONFIG, GGUF, Checkpoint, Folder, checkpoint_folder, read_json
from freebits.storage.safetensors_files import Entry, WeightsFile, parse_header
from freebits.types import TensorSpec, bytes_of

MODEL = "model"
"""Key of the model's own config in the `config.json` of a packed folder."""
_GIVE_BASE = f"give the right base, by `base` or by the environment variable {BASE_PATH}"


class PackedFolder:
    """A packed folder. Its manifest and file headers are checked when it is opened. Implements `Folder`.

    Attributes:
        manifest: the manifest.
        files: the weights files.
        stored: specs of the stored tensors, in file order.
        specs: specs of the decoded tensors. With the codec `none`, a tensor of an auxiliary weights file is called
            `file/name`.
        config: the model's config.
        originals: with the codec `none`, name of an original weights file → name of a tensor in this folder → entry of
            the tensor in the original header.

    Args:
        path: the folder.
        verify: whether to check the digest of each stored tensor when it is read.
        base: folder or hub id of the model's base; by default, see `Base.locate`.
        n_bases: maximum length of the chain of bases (a base may need a base, too), so that a cycle is an error.

    Raises:
        CheckpointError: the folder is not packed, or a file is missing, damaged or not as the manifest describes it.
            Damaged tensors raise this error only when they are read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        verify: bool = True,
        base: str | os.PathLike[str] | None = None,
        n_bases: int = BASES,
    ) -> None:
        self.path = checkpoint_folder(path)
        self.manifest = Manifest.read(self.path)
        self._verify, self._base, self._n_bases = verify, base, n_bases
        self._base_tensors = self.manifest.base.tensors if self.manifest.base else {}
        self.files = [WeightsFile(self.path / file) for file in self.manifest.files]
        self._files = {name: file for file in self.files for name in file.entries}
        self.stored = {name: file.entries[name].spec for name, file in self._files.items()}
        if sum(len(file.entries) for file in self.files) > len(self.stored):
            raise self._damaged("two of its weights files have a tensor with the same name")
        for name in sorted(self.stored.keys() ^ self.manifest.digests.keys()):
            raise self._damaged(f"tensor {name} is missing in the manifest or in the weights files")
        try:
            self.specs: Mapping[str, TensorSpec] = check_recipes(
                self.stored, self.manifest.recipes, {name: tensor.spec for name, tensor in self._base_tensors.items()}
            )
        except ValueError as error:
            raise self._damaged(str(error)) from None
        self._recipes = {name: recipe for recipe in self.manifest.recipes for name in recipe.makes}
        self._last_group: tuple[str, dict[str, Tensor]] = "", {}
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
            raise self._damaged(f"tensor {min(self.specs.keys() ^ listed)} is in no header of an original file")

    @property
    def shard_bytes(self) -> int | None:
        """Number of bytes of tensors in the largest weights file; None if there is only one file."""
        return max(file.n_bytes for file in self.files) if len(self.files) > 1 else None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The steps that made the model, oldest first."""
        return self.manifest.history

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The paths of the weights files."""
        return tuple(file.path for file in self.files)

    def __getitem__(self, name: str) -> Tensor:
        """Decode the tensor called `name`, reading only the stored tensors that it is made of."""
        if name not in self.specs:
            raise CheckpointError(
                f"tensor {name} is missing in {self.path}, so the checkpoint is incomplete: download it again"
            )
        root, (last_root, cache) = self._root(name), self._last_group
        if last_root != root:
            cache = {}
        tensor = self._decode(name, cache)
        cache.pop(name, None)
        self._last_group = root, cache  # callers often read the other tensors of the group next
        return tensor

    @cached_property
    def base(self) -> Folder:
        """The model's base. It is opened when its first tensor is needed.

        Raises:
            CheckpointError: the base is missing, or too many bases are needed.
        """
        if self.manifest.base is None:
            raise self._damaged("it has no base")
        folder = self.manifest.base.locate(self.path, self._base)
        if not self._n_bases:
            raise CheckpointError(
                f"{self.path} is the last base in a chain of {BASES}, but also needs a base: one of the bases may be "
                "its own base"
            )
        return open_folder(folder, n_bases=self._n_bases - 1)

    def is_reproducible(self, name: str) -> bool:
        """Return whether all machines decode the same values of a tensor."""
        recipe = self._recipes.get(name)
        if recipe is None:
            return True
        return CODES[recipe.code].check is Check.DIGEST and all(map(self.is_reproducible, recipe.takes.values()))

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Return the names in groups. The tensors of a group are decoded together."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self._root(name), []).append(name)
        return list(groups.values())

    def _root(self, name: str) -> str:
        """Return the name of the first stored tensor that a tensor is made of."""
        while recipe := self._recipes.get(name):
            name = next(iter(recipe.takes.values()), "")
        return name

    def decoded(self, names: Iterable[str], parallel: Parallel = Parallel()) -> Iterator[dict[str, Tensor]]:
        """Yield decoded tensors, group by group in the order of `groups`. Several groups are decoded in parallel."""
        groups = self.groups(names)
        group_sizes = (sum(self.specs[name].n_bytes for name in names) for names in groups if len(names) > 1)
        # a group of one tensor needs no linear algebra, so its size does not limit the number of threads
        with parallel.executor(max(group_sizes, default=0)) as executor:
            yield from executor.map(self._decode_group, groups)

    def _decode_group(self, names: list[str]) -> dict[str, Tensor]:
        cache: dict[str, Tensor] = {}
        return {name: self._decode(name, cache) for name in names}

    def model_tensors(self, parallel: Parallel = Parallel()) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and tensors of the model. Tensors of auxiliary weights files are left out."""
        return self.tensors(self.model_specs, parallel)

    def tensors(self, names: Iterable[str], parallel: Parallel = Parallel()) -> Iterator[tuple[str, Tensor]]:
        """Yield names and decoded tensors."""
        for tensors in self.decoded(names, parallel):
            yield from tensors.items()

    @property
    def model_specs(self) -> dict[str, TensorSpec]:
        """Specs of the model's tensors. Tensors of auxiliary weights files are left out."""
        auxiliary = {name for file in self.manifest.auxiliary for name in self.originals.get(file, {})}
        return {name: spec for name, spec in self.specs.items() if name not in auxiliary}

    def check(self, parallel: Parallel = Parallel()) -> None:
        """Check the folder by decoding every tensor.

        Raises:
            CheckpointError: a tensor is damaged.
        """
        for _ in self.decoded(self.specs, parallel):
            pass

    def _decode(self, name: str, cache: dict[str, Tensor]) -> Tensor:
        """Read a stored tensor, or make a tensor by its recipe. All tensors that recipes make are added to `cache`."""
        if name in cache:
            return cache[name]
        recipe = self._recipes.get(name)
        if recipe is None:
            return self._base_tensor(name) if name in self._base_tensors else self.stored_tensor(name)
        cache |= self._follow(recipe, cache)
        return cache[name]

    def _follow(self, recipe: Recipe, cache: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = {part: self._decode(name, cache) for part, name in recipe.takes.items()}
        try:
            tensors = CODES[recipe.code].decode(parts, list(recipe.makes.values()), recipe.params)
            if self._verify:
                recipe.check(tensors)
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError, MemoryError) as error:
            raise self._damaged(f"tensor {next(iter(recipe.makes))} cannot be decoded ({error})") from None
        return dict(zip(recipe.makes, tensors, strict=True))

    def integer_chunks(self, recipe: Recipe, n_rows: int = 1 << 62) -> Iterator[IntegerChunk]:
        """Yield the integers of the matrices that a recipe with the `integers` code makes; see `Integers.chunks`."""
        parts = {part: self._decode(name, {}) for part, name in recipe.takes.items()}
        try:
            yield from Integers().chunks(parts, list(recipe.makes.values()), recipe.params, n_rows)
        except (ValueError, KeyError) as error:
            raise self._damaged(f"tensor {next(iter(recipe.makes))} cannot be decoded ({error})") from None

    def stored_tensor(self, name: str) -> Tensor:
        """Read a stored tensor.

        Raises:
            CheckpointError: the tensor is damaged.
        """
        data = self._files[name].read(name)
        if self._verify and digest(self.stored[name], data) != self.manifest.digests[name]:
            raise self._damaged(f"tensor {name} does not match its digest")
        return self.stored[name].view(data)

    def _base_tensor(self, name: str) -> Tensor:
        """Read a tensor of the base, and check its digest, because another base would give other weights."""
        expected, base = self._base_tensors[name], self.base
        spec = base.specs.get(expected.name)
        if spec != expected.spec:
            raise CheckpointError(
                f"{self.path} needs a base whose {expected.name} is {expected.spec}, but in {base.path} it is "
                f"{spec or 'missing'}: {_GIVE_BASE}"
            )
        tensor = base[expected.name]
        if (actual := digest(expected.spec, bytes_of(tensor))) != expected.digest:
            raise CheckpointError(
                f"{self.path} needs a base whose {expected.name} has the digest {expected.digest}, but in {base.path} "
                f"it has {actual}: {_GIVE_BASE}"
            )
        return tensor

    def _config(self) -> dict[str, Any]:
        if not self.manifest.exact:
            config = read_json(self.path / CONFIG).get(MODEL)
        else:
            try:
                originals = self.manifest.originals
                config = json.loads(originals[CONFIG if CONFIG in originals else ADAPTER])
            except (ValueError, RecursionError) as error:
                raise self._damaged(f"its original config is not JSON ({error})") from None
        if not isinstance(config, dict):
            raise self._damaged("its config is not a JSON object")
        return config

    def _entries(self, file: str) -> dict[str, Entry]:
        try:
            entries = parse_header(self.manifest.originals[file])
        except (KeyError, ValueError) as error:
            raise self._damaged(f"the header of {file} is invalid ({error})") from None
        prefix = f"{file}/" if file in self.manifest.auxiliary else ""
        entries_by_name = {prefix + entry.name: entry for entry in entries}
        for name, entry in entries_by_name.items():
            if self.specs.get(name) != entry.spec:
                raise self._damaged(f"tensor {name} does not have the spec that the header of {file} declares")
        return entries_by_name

    def _check_shortcuts(self, layout: Layout, architecture: Architecture) -> None:
        """Check that shortcuts stored as factors would not be too large as dense matrices."""
        widths = layout.widths or ()
        sites = [sub.site for sub in architecture.sublayers if layout.rank(sub.site) is not None]
        try:
            check_expansion(
                sum(
                    spec.n_bytes
                    for spec in (*self.stored.values(), *(base.spec for base in self._base_tensors.values()))
                ),
                sum(2 * widths[site - 1] * widths[site] for site in sites),
            )
        except ValueError as error:
            raise self._damaged(f"its shortcuts are too large ({error})") from None

    def _damaged(self, finding: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged because {finding}: download the folder again")


def open_folder(path: str | os.PathLike[str], *, n_bases: int = BASES) -> Folder:
    """Open the checkpoint in a folder, packed or not. See `PackedFolder` for `n_bases`.

    Raises:
        CheckpointError: the folder holds no valid checkpoint.
    """
    return PackedFolder(path, n_bases=n_bases) if is_packed(path) else Checkpoint(path)
