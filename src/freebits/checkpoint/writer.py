"""Write a checkpoint's weights, a tensor at a time, in as many files as it takes."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from freebits.checkpoint.folder import INDEX, SINGLE, Checkpoint, write_json
from freebits.checkpoint.weights import WeightsWriter
from freebits.kind import Bytes, Kind, bytes_of


def shard_bytes(source: Checkpoint) -> int | None:
    """How large the largest file of a sharded checkpoint is, tensors alone; None where it is one file."""
    return max(file.n_bytes for file in source.weights.values()) if len(source.weights) > 1 else None


class CheckpointWriter:
    """Stream tensors into safetensors files, a new one when the next tensor would pass `shard_bytes`.

    Args:
        directory: where to write.
        announced: every tensor that may come, by its name and a shape that is no shorter to write.
        shard_bytes: see above; None makes one file.
    """

    def __init__(
        self, directory: Path, announced: Mapping[str, tuple[int, ...]], shard_bytes: int | None = None
    ) -> None:
        self._directory = directory
        self._announced = announced
        self._shard_bytes = shard_bytes
        self._shards: list[WeightsWriter] = []

    def __enter__(self) -> "CheckpointWriter":
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        self.write_bytes(name, Kind.of(tensor), bytes_of(tensor))

    def write_bytes(self, name: str, kind: Kind, data: Bytes) -> None:
        """Append one tensor, given its bytes."""
        full = self._shards and self._shard_bytes and self._shards[-1].size + kind.n_bytes > self._shard_bytes
        if full or not self._shards:
            if self._shards:
                self._shards[-1].close()
            self._shards.append(WeightsWriter(self._directory / f"{len(self._shards)}.part", self._announced))
        self._shards[-1].write(name, kind, data)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._shards:
            self._shards[-1].__exit__(kind, *error)
        if kind is None:
            self._name_shards()

    def _name_shards(self) -> None:
        if len(self._shards) == 1:
            self._shards[0].path.rename(self._directory / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            file = f"model-{number:05}-of-{len(self._shards):05}.safetensors"
            shard.path.rename(self._directory / file)
            weight_map |= dict.fromkeys(shard.header, file)
        total = sum(shard.size for shard in self._shards)
        write_json(self._directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
