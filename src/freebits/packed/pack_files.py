"""Pack any checkpoint with the codec `none`. Unpacking restores its weights files byte for byte."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from freebits.codecs.columns import fields_of
from freebits.codecs.registry import CODES
from freebits.execution.progress import Progress
from freebits.execution.work_store import Work
from freebits.packed.contents import STEM, Contents, announced, digested
from freebits.packed.encoded_piece import Piece, encoded, staged
from freebits.packed.open_base import OpenBase
from freebits.storage.auxiliary_files import stays_inside
from freebits.storage.checkpoint import Checkpoint, config_name, open_weights, read_json, read_text
from freebits.storage.gguf import GgufFile
from freebits.storage.safetensors_files import Entry, WeightsFile
from freebits.storage.writer import CheckpointWriter


def pack_files(
    source: Checkpoint, directory: Path, stage: str | None, base: OpenBase | None, work: Work, progress: Progress
) -> Contents:
    """Write the tensors of all weights files, and collect the file headers.

    A tensor is entropy-coded if this saves bytes. If its differences from the base's tensor of the same name take even
    fewer bytes, only the differences are stored.

    Raises:
        CheckpointError: a file is damaged.
    """
    folder = source.path
    paths = sorted({*folder.glob("*.safetensors"), *(file.path for file in source.weights.values())})
    files = {
        path.name: open_weights(path) for path in paths if path.name in source.weights or stays_inside(path, folder)
    }
    contents = Contents(auxiliary=[name for name in files if name not in source.weights])
    indices = [path for path in sorted(folder.glob("*.index.json")) if stays_inside(path, folder) and read_json(path)]
    contents.originals = {path.name: read_text(path) for path in (folder / config_name(folder), *indices)}
    contents.originals |= {name: file.header for name, file in files.items()}
    prefixes = {name: f"{name}/" if name in contents.auxiliary else "" for name in files}
    specs = {prefixes[name] + tensor: e.spec for name, file in files.items() for tensor, e in file.entries.items()}
    entries = [(name, entry) for name, file in files.items() for entry in file.entries.values()]
    pieces = work.map("tensor", partial(_piece, files, prefixes, stage, {*specs}, base), entries)
    block_files = [(prefixes[name], file.fields) for name, file in files.items() if isinstance(file, GgufFile)]
    columns = {
        f"{prefix}{tensor}.{number}": specs[prefix + tensor]
        for prefix, fields_by_tensor in block_files
        for tensor, fields in fields_by_tensor.items()
        for number in range(len(fields))
    }
    with CheckpointWriter(directory, announced(specs | columns), source.shard_bytes, STEM) as writer:
        for done, (piece, digests) in enumerate(pieces, start=1):
            contents.write(writer, piece, digests)
            progress("packing", "tensor", done, len(entries))
    return contents


def _piece(
    files: Mapping[str, WeightsFile],
    prefixes: Mapping[str, str],
    stage: str | None,
    used_names: Collection[str],
    base: OpenBase | None,
    item: tuple[str, Entry],
) -> tuple[Piece, dict[str, str]]:
    """Encode one tensor of a weights file. Return the piece and the digests of the stored tensors."""
    name, entry = item
    file, target = files[name], prefixes[name] + entry.name
    tensor = entry.spec.view(file.read(entry.name))
    encode_alone = partial(_encoded_alone, file, entry, target, tensor, stage, used_names)
    if base is None:
        return digested(encode_alone())
    return digested(*base.exact_piece(target, entry.spec, tensor, encode_alone, used_names))


def _encoded_alone(
    file: WeightsFile, entry: Entry, target: str, tensor: Tensor, stage: str | None, used_names: Collection[str]
) -> Piece:
    """Encode one tensor without a base."""
    if isinstance(file, GgufFile) and entry.name in file.fields:
        columns = fields_of(tensor, file.fields[entry.name])
        parts = {str(number): column for number, column in enumerate(columns)}
        return staged(encoded("columns", CODES["columns"], target, parts, {target: entry.spec}), stage, used_names)
    return staged(Piece({target: (entry.spec, tensor)}), stage, used_names)
