"""Codec `none`: the safetensors files of any checkpoint, whatever the architecture, to come back byte for byte."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from freebits.codecs.columns import fields_of
from freebits.codecs.registry import CODES
from freebits.execution.progress import Progress
from freebits.execution.work_store import Work
from freebits.packed.contents import STEM, Contents, announced, digests_of
from freebits.packed.piece import Piece, encoded, staged
from freebits.storage.auxiliary_files import stays_inside
from freebits.storage.folder import Checkpoint, config_name, opened_weights, read_json, read_text
from freebits.storage.gguf import GgufFile
from freebits.storage.weights import Entry, WeightsFile
from freebits.storage.writer import CheckpointWriter, shard_bytes


def pack_files(source: Checkpoint, directory: Path, stage: str | None, work: Work, progress: Progress) -> Contents:
    """Write the tensors of all files, each entropy-coded where that gains; the headers of the files go to the manifest.

    Raises:
        CheckpointError: a file is damaged.
    """
    folder = source.path
    found = sorted({*folder.glob("*.safetensors"), *(of.path for of in source.weights.values())})
    files = {
        file.name: opened_weights(file) for file in found if file.name in source.weights or stays_inside(file, folder)
    }
    contents = Contents(auxiliary=[name for name in files if name not in source.weights])
    indices = [file for file in sorted(folder.glob("*.index.json")) if stays_inside(file, folder) and read_json(file)]
    contents.originals = {file.name: read_text(file) for file in (folder / config_name(folder), *indices)}
    contents.originals |= {name: file.header for name, file in files.items()}
    prefixes = {name: f"{name}/" if name in contents.auxiliary else "" for name in files}
    specs = {prefixes[name] + tensor: e.spec for name, file in files.items() for tensor, e in file.entries.items()}
    entries = [(name, entry) for name, file in files.items() for entry in file.entries.values()]
    pieces = work.map("tensor", partial(_piece, files, prefixes, stage, {*specs}), entries)
    blocks = [(prefixes[name], file.fields) for name, file in files.items() if isinstance(file, GgufFile)]
    parts = {
        f"{prefix}{tensor}.{number}": specs[prefix + tensor]
        for prefix, fields in blocks
        for tensor, of in fields.items()
        for number in range(len(of))
    }
    with CheckpointWriter(directory, announced(specs | parts), shard_bytes(source), STEM) as writer:
        for done, (piece, digests) in enumerate(pieces, start=1):
            contents.write(writer, piece, digests)
            progress("packing", "tensor", done, len(entries))
    return contents


def _piece(
    files: Mapping[str, WeightsFile],
    prefixes: Mapping[str, str],
    stage: str | None,
    taken: Collection[str],
    item: tuple[str, Entry],
) -> tuple[Piece, dict[str, str]]:
    """One tensor of a file, under its name in the packed folder."""
    name, entry = item
    file, target = files[name], prefixes[name] + entry.name
    tensor = entry.spec.view(file.read(entry.name))
    if isinstance(file, GgufFile) and entry.name in file.fields:
        of_fields = fields_of(tensor, file.fields[entry.name])
        parts = {str(number): part for number, part in enumerate(of_fields)}
        piece = staged(encoded("columns", CODES["columns"], target, parts, {target: entry.spec}), stage, taken)
    else:
        piece = staged(Piece({target: (entry.spec, tensor)}), stage, taken)
    return piece, digests_of(piece)
