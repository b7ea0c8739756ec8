"""Write the weights of a checkpoint one tensor at a time, to one file or to shards."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from freebits.storage.checkpoint import STEMS, WEIGHTS, index_of, write_json
from freebits.storage.safetensors_files import WeightsWriter
from freebits.types import Bytes, TensorSpec, bytes_of


class CheckpointWriter:
    """Writes tensors to safetensors files. A new file begins if the current file would get more than `shard_bytes`.

    Args:
        directory: the output folder.
        announced: name → shape of every tensor that can be written. A written name or shape must not need more
            characters than the announced one.
        shard_bytes: the largest number of bytes of tensors in a file; if None, all tensors are in one file.
        stem: the stem of the file names.
    """

    def __init__(
        self,
        directory: Path,
        announced: Mapping[str, tuple[int, ...]],
        shard_bytes: int | None = None,
        stem: str = WEIGHTS,
    ) -> None:
        self._directory = directory
        self._announced = announced
        self._shard_bytes = shard_bytes
        self._stem = stem
        self._shards: list[WeightsWriter] = []

    def __enter__(self) -> "CheckpointWriter":
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        self.write_bytes(name, TensorSpec.of(tensor), bytes_of(tensor))

    def write_bytes(self, name: str, spec: TensorSpec, data: Bytes) -> None:
        """Append the bytes of one tensor."""
        exceeds = self._shards and self._shard_bytes and self._shards[-1].size + spec.n_bytes > self._shard_bytes
        if exceeds or not self._shards:
            self._next_shard()
        self._shards[-1].write(name, spec, data)

    def __exit__(self, error_type: type[BaseException] | None, *error: object) -> None:
        if error_type is None:
            if not self._shards:  # a checkpoint without tensors needs a file, too
                self._next_shard()
            self._shards[-1].close()
            self._name_shards()
        elif self._shards:
            self._shards[-1].__exit__(error_type, *error)

    def _next_shard(self) -> None:
        if self._shards:
            self._shards[-1].close()
        self._shards.append(WeightsWriter(self._directory / f"{len(self._shards)}.part", self._announced))

    def _name_shards(self) -> None:
        files = [f"{self._stem}-{number:05}-of-{len(self._shards):05}" for number in range(1, len(self._shards) + 1)]
        files = [f"{file}.safetensors" for file in (files if len(files) > 1 else [self._stem])]
        for shard, file in zip(self._shards, files, strict=True):
            shard.path.rename(self._directory / file)
        if len(files) > 1 and self._stem in STEMS:
            weight_map = {name: file for shard, file in zip(self._shards, files, strict=True) for name in shard.header}
            total = sum(shard.size for shard in self._shards)
            write_json(
                self._directory / index_of(self._stem), {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
