"""Codec `none`: the safetensors files of any checkpoint, whatever the architecture, to come back byte for byte."""

from collections.abc import Collection
from functools import partial
from pathlib import Path

from freebits.checkpoint import CONFIG, Checkpoint, Entry, WeightsFile, WeightsWriter, carry_code, read_text
from freebits.kind import bytes_of
from freebits.packed.contents import Contents, announced, digests_of
from freebits.packed.piece import Piece, staged
from freebits.work import Progress, ordered_map, workers


def pack_files(
    source: Checkpoint, directory: Path, stage: str | None, jobs: int | None, progress: Progress
) -> Contents:
    """Write a file for each file, each tensor entropy-coded where that gains; the original headers go to the manifest.

    Raises:
        CheckpointError: a file is damaged.
    """
    files = {file.name: WeightsFile(file) for file in sorted(source.path.glob("*.safetensors"))}
    contents = Contents(list(files), beside=[name for name in files if name not in source.weights])
    texts = [CONFIG, *(file.name for file in sorted(source.path.glob("*.index.json")))]
    contents.originals = {file: read_text(source.path / file) for file in texts}
    contents.originals |= {name: file.header for name, file in files.items()}
    prefixes = {name: f"{name}/" if name in contents.beside else "" for name in files}
    taken = {prefixes[name] + tensor for name, file in files.items() for tensor in file.entries}
    total, done = sum(len(file.entries) for file in files.values()), 0
    with workers(jobs) as executor:
        for name, file in files.items():
            read = partial(_piece, file, prefixes[name], stage, taken)
            kinds = {prefixes[name] + tensor: entry.kind for tensor, entry in file.entries.items()}
            with WeightsWriter(directory / name, announced(kinds)) as writer:
                for piece, digests in ordered_map(executor, read, file.entries.values()):
                    for stored, (kind, tensor) in piece.stored.items():
                        writer.write(stored, kind, bytes_of(tensor))
                    contents.add(piece, digests)
                    progress(done := done + 1, total)
    carry_code(source.path, directory)
    return contents


def _piece(
    file: WeightsFile, prefix: str, stage: str | None, taken: Collection[str], entry: Entry
) -> tuple[Piece, dict[str, str]]:
    """One tensor of a file, under its name in the packed folder."""
    tensor = entry.kind.view(file.read(entry.name))
    piece = staged(Piece({prefix + entry.name: (entry.kind, tensor)}), stage, taken)
    return piece, digests_of(piece)
