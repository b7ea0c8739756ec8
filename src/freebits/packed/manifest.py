"""The manifest of a packed checkpoint; `docs/format.md` specifies it byte for byte."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from freebits.errors import CheckpointError
from freebits.packed.recipe import Recipe
from freebits.storage.folder import ADAPTER, CONFIG, GGUF, read_json, read_text
from freebits.types import Bytes, TensorSpec
from freebits.version import __version__

FORMAT = 1
MANIFEST = "freebits.json"


@dataclass(frozen=True)
class Manifest:
    """What a packed checkpoint says of itself, stored as `freebits.json`.

    Attributes:
        codec: the preset of moves and codes that was asked for.
        entropy: the bit-exact stage on top.
        history: the moves that made this model, in order: each with its fidelity, its parameters, the sizes before it.
        notes: what became of each site.
        recipes: how the stored tensors become the model's.
        digests: of every stored tensor.
        files: the weights files.
        config: digest of `config.json`.
        originals: with codec `none` what is needed to write the original files again: the text of `config.json` and of
            an index, the header of each weights file.
        auxiliary: of those weights files, the ones that are not the model.
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
    format: int = FORMAT
    producer: str = f"freebits {__version__}"

    def write(self, directory: Path) -> None:
        """Write the manifest into a packed folder, with the digest of itself."""
        content = vars(self) | {"recipes": [recipe.facts for recipe in self.recipes]}
        text = _compact(content | {"digest": _digest_of_json(content)})
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check the manifest of a packed folder.

        Raises:
            CheckpointError: it is missing, damaged, or of a format this version does not know.
        """
        path = directory / MANIFEST
        if not path.exists():
            raise CheckpointError(f"{directory} holds no {MANIFEST}: it is not a packed checkpoint")
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is of format {content.get('format')!r}, this freebits reads format {FORMAT}: "
                "unpack with the version that wrote it, or upgrade"
            )
        if content.pop("digest", None) != _digest_of_json(content):
            raise CheckpointError(f"{path} is damaged (its digest does not match): download it again")
        try:
            recipes = [Recipe.parse(facts) for facts in content.pop("recipes")]
            manifest = cls(recipes=recipes, **content)
            manifest.check()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} does not follow format {FORMAT} ({error}): pack the model again") from None
        if digest_of_file(directory / CONFIG) != manifest.config:
            raise CheckpointError(
                f"{directory / CONFIG} changed since packing (its digest does not match): "
                "restore it, or unpack first and edit the unpacked copy"
            )
        return manifest

    def check(self) -> None:
        """Check what the types do not say.

        Raises:
            ValueError: a value that this format does not know.
        """
        lists = (self.history, self.notes, self.files, self.auxiliary)
        tables = (self.digests, self.originals)
        if not all(isinstance(part, list) for part in lists) or not all(isinstance(part, dict) for part in tables):
            raise ValueError("a list or a table that is none")
        texts = [self.codec, self.entropy, self.config, *self.files, *self.auxiliary]
        texts += [text for table in tables for pair in table.items() for text in pair]
        if not all(isinstance(text, str) for text in texts) or not all(
            isinstance(e, dict) for e in lists[0] + lists[1]
        ):
            raise ValueError("a text or an entry that is none")
        if any("\0" in file for file in (*self.files, *self.originals, *self.auxiliary)) or any(
            map(_unwritable, texts)
        ):
            raise ValueError("a text that no file can hold")
        if (self.auxiliary and not self.exact) or bool(self.originals) != self.exact:
            raise ValueError("original files without a config")
        if not all(type(note.get("site")) is type(note.get("corrections", 0)) is int for note in self.notes):
            raise ValueError("a note without its site")
        for file in self.files:
            if Path(file).name != file or not file.endswith(".safetensors") or self.files.count(file) > 1:
                raise ValueError(f"{file!r} is no weights file beside the manifest")
        for file in self.originals:
            if Path(file).name != file or not (
                file in (CONFIG, ADAPTER) or file.endswith((".safetensors", ".index.json", f".{GGUF}"))
            ):
                raise ValueError(f"{file!r} is no file of a checkpoint")

    @property
    def exact(self) -> bool:
        """Whether it holds files that come back byte for byte."""
        return bool({CONFIG, ADAPTER} & self.originals.keys())


def _unwritable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return True
    return False


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a packed checkpoint."""
    try:
        return (Path(path) / MANIFEST).is_file()
    except (OSError, ValueError):  # a name too long, for instance
        return False


def sizes_before(history: object) -> dict[str, int]:
    """The sizes that a history tells, of what there was before its moves; none where it makes no sense."""
    entries = [entry for entry in history if isinstance(entry, Mapping)] if isinstance(history, list) else []
    tables = [entry.get("bytes") for entry in entries]
    told = {key: n for table in tables if isinstance(table, Mapping) for key, n in table.items()}
    return {key: n for key, n in told.items() if type(n) is int and 0 < n < 2**62}


def digest(spec: TensorSpec, data: Bytes) -> str:
    """XXH3-128 over the kind and the bytes of a tensor, 32 hexadecimal digits."""
    code = xxhash.xxh3_128(str(spec).encode())
    code.update(data.data)
    return code.hexdigest()


def digest_of_file(path: Path) -> str:
    """XXH3-128 over a text file, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(read_text(path).encode())


def _digest_of_json(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_compact(content).encode())


def _compact(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
