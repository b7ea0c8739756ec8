"""The manifest of a packed checkpoint; `docs/format.md` specifies it byte for byte."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from freebits.checkpoint import read_json
from freebits.errors import CheckpointError
from freebits.version import __version__

FORMAT = 1
MANIFEST = "freebits.json"
DTYPES = {
    "canonical": ("float16", "bfloat16", "float32", "float64"),
    "bits-back": ("float16", "bfloat16"),
    "none": ("",),
}
"""Codec → dtypes of the words it can encode."""
PLAIN = "plain"
ENTROPIES = ("auto", "none")
_MOST_ROWS = 2**31


@dataclass(frozen=True)
class SiteRecord:
    """What became of one site.

    Attributes:
        site: its number.
        name: where its rotation went: the sublayer that leads to the site, `model.layers.0.attention`, or for site 0
            the layer that reads it.
        codec: a key of `freebits.packed.sites.codecs.SITE_CODECS`, or `plain`: stored as in the sliced model.
        tensors: names and shapes of what its parts decode to, in the order of their words.
        corrections: number of corrected words.
        reason: why a plain site is plain.
    """

    site: int
    name: str
    codec: str
    tensors: list[tuple[str, list[int]]] = field(default_factory=list)
    corrections: int = 0
    reason: str = ""

    @classmethod
    def plain(cls, site: int, name: str, reason: str) -> "SiteRecord":
        """A site left as it is."""
        return cls(site, name, PLAIN, reason=reason)

    def check(self) -> None:
        """Check what the types do not say.

        Raises:
            ValueError: a value that this format does not know.
        """
        encoded = bool(self.tensors) and not self.reason and all(map(_is_matrix, self.tensors))
        sound = bool(self.reason) and not self.tensors if self.codec == PLAIN else encoded
        texts = all(isinstance(text, str) for text in (self.name, self.codec, self.reason))
        if not (sound and texts and type(self.site) is type(self.corrections) is int):
            raise ValueError(f"site {self.name!r}")

    @property
    def facts(self) -> dict[str, Any]:
        """The record as JSON, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value or key == "site"}


@dataclass(frozen=True)
class Manifest:
    """What a packed checkpoint says of itself, stored as `freebits.json`.

    Attributes:
        codec: the codec asked for; sites may still be plain.
        entropy: the bit-exact stage on top.
        threshold: largest error of a decoded word left without correction; None where nothing is corrected.
        dtype: of the words.
        bytes: sizes of what this was made from: `dense`, `dense_untied`, `sliced`; None where not known.
        sites: how each is stored.
        tensors: digest of every stored tensor.
        coded: dtype and shape of the tensors for which bytes stand, as `F16[456, 576]`.
        headers: with codec `none` the header of each file, which is to come back byte for byte.
        config: digest of `config.json`.
    """

    codec: str
    entropy: str
    threshold: float | None
    dtype: str
    bytes: dict[str, int | None]
    sites: list[SiteRecord]
    tensors: dict[str, str]
    coded: dict[str, str]
    config: str
    headers: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT
    producer: str = f"freebits {__version__}"

    def write(self, directory: Path) -> None:
        """Write the manifest into a packed directory, with the digest of itself."""
        content = asdict(self) | {"sites": [site.facts for site in self.sites]}
        text = _compact(content | {"digest": _digest_of_json(content)})
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check the manifest of a packed directory.

        Raises:
            CheckpointError: it is missing, damaged, or of a format this version does not know.
        """
        path = directory / MANIFEST
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is of format {content.get('format')!r}, this freebits reads format {FORMAT}: "
                "unpack with the version that wrote it, or upgrade"
            )
        if content.pop("digest", None) != _digest_of_json(content):
            raise CheckpointError(f"{path} is damaged (its digest does not match): download it again")
        try:
            sites = [SiteRecord(**site) for site in content.pop("sites")]
            manifest = cls(sites=sites, **content)
            manifest.check()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} does not follow format {FORMAT} ({error}): pack the model again") from None
        if digest_of_file(directory / "config.json") != manifest.config:
            raise CheckpointError(
                f"{directory / 'config.json'} changed since packing (its digest does not match): "
                "restore it, or unpack first and edit the unpacked copy"
            )
        return manifest

    def check(self) -> None:
        """Check what the types do not say.

        Raises:
            ValueError: a value that format 1 does not know, or that contradicts another.
        """
        known = self.dtype in DTYPES[self.codec] and self.entropy in ENTROPIES
        sizes = [n for n in self.bytes.values() if n is not None]
        tables = (self.tensors, self.coded, self.headers)
        texts = all(isinstance(value, str) for table in tables for value in table.values())
        if not known or not texts or not all(type(n) is int for n in sizes):
            raise ValueError(f"codec {self.codec!r}, entropy {self.entropy!r}, dtype {self.dtype!r}")
        for site in self.sites:
            site.check()
        numbers = [site.site for site in self.sites]
        if len(set(numbers)) != len(numbers):
            raise ValueError("a site is described twice")


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a packed checkpoint."""
    return (Path(path) / MANIFEST).is_file()


def is_exact(path: str | os.PathLike[str]) -> bool:
    """Whether a packed folder holds a checkpoint's files as they were, with codec `none`.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    return Manifest.read(Path(path)).codec == "none"


def digest_of_file(path: Path) -> str:
    """XXH3-128 over a file, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _digest_of_json(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_compact(content).encode())


def _compact(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _is_matrix(tensor: tuple[str, list[int]]) -> bool:
    name, shape = tensor
    sizes = len(shape) == 2 and all(type(n) is int and 0 <= n < _MOST_ROWS for n in shape)
    return isinstance(name, str) and sizes and shape[0] > 0
