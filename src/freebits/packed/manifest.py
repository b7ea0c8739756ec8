"""The manifest of a packed checkpoint. `docs/format.md` specifies the manifest byte for byte."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from freebits.errors import CheckpointError
from freebits.packed.base import Base
from freebits.packed.recipe import Recipe
from freebits.storage.checkpoint import ADAPTER, CONFIG, GGUF, read_json, read_text
from freebits.types import Bytes, TensorSpec
from freebits.version import __version__

FORMAT = 1
MANIFEST = "freebits.json"


@dataclass(frozen=True)
class Manifest:
    """The description of a packed checkpoint, stored as `freebits.json`.

    Attributes:
        codec: name of the codec that packed the model.
        entropy: name of the bit-exact entropy stage.
        history: steps that made this model, oldest first. Each has its fidelity, its parameters, and the sizes of the
            model before the step.
        notes: notes on sites of the residual stream (see `freebits.models.architecture`). Each names the code that
            encodes a site, or the reason why no code does.
        recipes: recipes that decode the model's tensors from the stored tensors.
        digests: name → digest of each stored tensor.
        files: names of the weights files.
        config: digest of the packed folder's `config.json`.
        originals: with the codec `none`, name → text of each original file: the whole text of the config and of
            each index, and the header of each weights file. Unpacking restores the files from these texts.
        auxiliary: names of the original weights files that are not part of the model.
        base: model whose tensors some recipes take; None if there is none.
    """

    codec: str
    entropy: str
    history: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    recipes: list[Recipe]
    digests: dict[str, str]
    files: list[str]
    config: str
    originals: dict[str, str] = field(default_factory=dict)
    auxiliary: list[str] = field(default_factory=list)
    base: Base | None = None
    format: int = FORMAT
    producer: str = f"freebits {__version__}"

    def write(self, directory: Path) -> None:
        """Write the manifest into a packed folder, and with it a digest of its content."""
        content = vars(self) | {"recipes": [recipe.facts for recipe in self.recipes]}
        base = content.pop("base")
        content |= {"base": base.facts} if base else {}
        text = _compact(content | {"digest": _digest_of_json(content)})
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check the manifest of a packed folder.

        Raises:
            CheckpointError: the manifest is missing or damaged, its format is not supported, or the config has changed.
        """
        path = directory / MANIFEST
        if not path.exists():
            raise CheckpointError(f"there is no file {MANIFEST} in {directory}: give a folder that freebits packed")
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has format {content.get('format')!r}, but this freebits reads format {FORMAT}: "
                "upgrade freebits, or unpack the folder with the version of freebits that packed it"
            )
        if content.pop("digest", None) != _digest_of_json(content):
            raise CheckpointError(f"{path} is damaged (its digest does not match): download the file again")
        try:
            recipes = [Recipe.parse(facts) for facts in content.pop("recipes")]
            base = Base.parse(content.pop("base")) if "base" in content else None
            manifest = cls(recipes=recipes, base=base, **content)
            manifest.check()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} does not follow format {FORMAT} ({error}): pack the model again") from None
        if digest_of_file(directory / CONFIG) != manifest.config:
            raise CheckpointError(
                f"{directory / CONFIG} changed since packing (its digest does not match): "
                "download the file again, or restore it from a backup; to edit the config, unpack the folder first"
            )
        return manifest

    def check(self) -> None:
        """Check the types of the values, the file names, and that the values do not contradict each other.

        Raises:
            ValueError: a value does not follow the format.
        """
        lists = (self.history, self.notes, self.files, self.auxiliary)
        tables = (self.digests, self.originals)
        if not all(isinstance(value, list) for value in lists) or not all(isinstance(value, dict) for value in tables):
            raise ValueError("a value should be a list or an object, but is something else")
        texts = [self.codec, self.entropy, self.config, self.producer, *self.files, *self.auxiliary]
        texts += [text for table in tables for pair in table.items() for text in pair]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a value should be a string, but is something else")
        if not all(isinstance(entry, dict) for entry in self.history + self.notes):
            raise ValueError("an entry in the history or in the notes is not an object")
        file_names = (*self.files, *self.originals, *self.auxiliary)
        if any("\0" in name for name in file_names) or not all(map(_is_encodable, texts)):
            raise ValueError("a file name contains a null character, or a string cannot be encoded in UTF-8")
        if (self.auxiliary and not self.exact) or bool(self.originals) != self.exact:
            raise ValueError("the manifest lists original files, but no original config")
        if not all(type(note.get("site")) is type(note.get("corrections", 0)) is int for note in self.notes):
            raise ValueError("a note has no site, or its site or its corrections are not a whole number")
        for name in self.files:
            if Path(name).name != name or not name.endswith(".safetensors") or self.files.count(name) > 1:
                raise ValueError(f"{name!r} is not the name of a weights file, or is listed twice")
        for name in self.originals:
            if Path(name).name != name or not (
                name in (CONFIG, ADAPTER) or name.endswith((".safetensors", ".index.json", f".{GGUF}"))
            ):
                raise ValueError(f"{name!r} is not the name of a config, an index or a weights file")

    @property
    def exact(self) -> bool:
        """Whether unpacking restores the original files byte for byte."""
        return bool({CONFIG, ADAPTER} & self.originals.keys())


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # UTF-8 cannot encode a lone surrogate
        return False
    return True


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a packed checkpoint."""
    try:
        return (Path(path) / MANIFEST).is_file()
    except (OSError, ValueError):  # `is_file` fails, for instance because the name is too long
        return False


def recorded_sizes(history: object) -> dict[str, int]:
    """Return the sizes in bytes that a history records. Later steps override earlier ones. Skip invalid entries."""
    entries = [entry for entry in history if isinstance(entry, Mapping)] if isinstance(history, list) else []
    tables = [entry.get("bytes") for entry in entries]
    sizes = {key: size for table in tables if isinstance(table, Mapping) for key, size in table.items()}
    return {key: size for key, size in sizes.items() if type(size) is int and 0 < size < 2**62}


def digest(spec: TensorSpec, data: Bytes) -> str:
    """Return the XXH3-128 digest of a tensor's spec and bytes, 32 hexadecimal digits."""
    hasher = xxhash.xxh3_128(str(spec).encode())
    hasher.update(data.data)
    return hasher.hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the XXH3-128 digest of a text file, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(read_text(path).encode())


def _digest_of_json(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_compact(content).encode())


def _compact(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
