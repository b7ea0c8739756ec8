"""Codec `none`: the safetensors files of any checkpoint, whatever the architecture, to come back byte for byte."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from freebits.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Entry,
    WeightsFile,
    config_name,
    read_json,
    read_text,
    shard_bytes,
    stays_inside,
)
from freebits.packed.contents import STEM, Contents, announced, digests_of
from freebits.packed.piece import Piece, staged
from freebits.work import Progress, Work


def pack_files(source: Checkpoint, directory: Path, stage: str | None, work: Work, progress: Progress) -> Contents:
    """Write the tensors of all files, each entropy-coded where that gains; the headers of the files go to the manifest.

    Raises:
        CheckpointError: a file is damaged.
    """
    folder = source.path
    found = (file for file in sorted(folder.glob("*.safetensors")))
    files = {
        file.name: WeightsFile(file) for file in found if file.name in source.weights or stays_inside(file, folder)
    }
    contents = Contents(beside=[name for name in files if name not in source.weights])
    indices = [file for file in sorted(folder.glob("*.index.json")) if stays_inside(file, folder) and read_json(file)]
    contents.originals = {file.name: read_text(file) for file in (folder / config_name(folder), *indices)}
    contents.originals |= {name: file.header for name, file in files.items()}
    prefixes = {name: f"{name}/" if name in contents.beside else "" for name in files}
    kinds = {prefixes[name] + tensor: e.kind for name, file in files.items() for tensor, e in file.entries.items()}
    entries = [(name, entry) for name, file in files.items() for entry in file.entries.values()]
    pieces = work.map("tensor", partial(_piece, files, prefixes, stage, {*kinds}), entries)
    with CheckpointWriter(directory, announced(kinds), shard_bytes(source), STEM) as writer:
        for done, (piece, digests) in enumerate(pieces, start=1):
            contents.write(writer, piece, digests)
            progress(done, len(entries))
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
    tensor = entry.kind.view(files[name].read(entry.name))
    piece = staged(Piece({prefixes[name] + entry.name: (entry.kind, tensor)}), stage, taken)
    return piece, digests_of(piece)
