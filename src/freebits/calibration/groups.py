"""Run a model on groups of windows, in this process or in another process.

A window is a sequence of tokens. All windows have the same length. A group is a set of windows that pass through the
model together.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.calibration.engine import Engine, open_engine
from freebits.calibration.observers import Region
from freebits.calibration.sensitivities import InputStatistics, Sums, measure
from freebits.dequantization.source import open_as_floats
from freebits.execution.progress import Progress, silent
from freebits.execution.serialization import storable
from freebits.execution.work_store import WorkStore
from freebits.integrations.naming import TransformersView


@dataclass(frozen=True)
class RunningModel:
    """A model in a folder. Each process opens the model when the process first uses it.

    Attributes:
        path: folder of the model.
        device: device on which to run the model.
    """

    path: Path
    device: torch.device

    @property
    def named(self) -> TransformersView:
        """The tensors of the model under transformers' names."""
        return self._opened[0]

    @property
    def engine(self) -> Engine:
        """The engine that runs the model."""
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[TransformersView, Engine]:
        return open_engine(open_as_floats(self.path), self.path, self.device)

    def __reduce__(self) -> tuple[Any, ...]:
        return RunningModel, (self.path, self.device)


@storable
@dataclass(frozen=True)
class StoredStatistics:
    """Input statistics whose Gram matrix is in the work store.

    Attributes:
        number: index, from 0, of the block execution after which the statistics were complete.
        key: key of the Gram matrix in the work store.
        regions: matrices that share the inputs.
        n: number of nonzero input vectors.
    """

    number: int
    key: str
    regions: tuple[Region, ...]
    n: int


def split_into_groups(tokens: Tensor, engine: Engine, max_bytes: int) -> list[tuple[int, Tensor]]:
    """Split windows into few groups. All groups have the same number of windows, except that the last may have fewer.

    The number of groups depends only on the arguments, never on the machine.

    Args:
        tokens: windows, (windows, T).
        engine: engine that runs the model.
        max_bytes: maximum bytes of a block's activations for one group. Rounding to whole windows can exceed this
            limit by the bytes of one window.

    Returns:
        For each group, the index of its first window, and its windows.
    """
    config = engine.model.config.get_text_config()
    width = getattr(config, "hidden_size", None) or max((shape[-1] for shape in engine.matrices.values()), default=1)
    block_shapes = [shape for name, shape in engine.matrices.items() if name.startswith(engine.blocks)]
    inner_width = max((max(shape[-2:]) for shape in block_shapes), default=width)
    n_tokens = max(tokens.shape[1], max_bytes // (4 * (3 * inner_width + 8 * width)))
    n_groups = -(-tokens.numel() // n_tokens)
    size = -(-len(tokens) // n_groups)
    return [(start, tokens[start : start + size]) for start in range(0, len(tokens), size)]


def measure_group(
    running: RunningModel, store: WorkStore, seed: int, group: tuple[int, Tensor], progress: Progress = silent
) -> tuple[Sums, list[StoredStatistics]]:
    """Measure one group of windows, and put the Gram matrices into the work store.

    Args:
        running: model to run.
        store: work store that receives the Gram matrices.
        seed: seed for sampling the labels; see `measure`.
        group: index of the group's first window, and the windows of the group, (windows, T).
        progress: callback after each block of the forward and the backward pass.

    Returns:
        The sums, and the input statistics, whose Gram matrices are in the work store.

    Raises:
        CheckpointError: see `measure`.
        UnsupportedModelError: see `measure`.
    """
    start, windows = group
    stored: list[StoredStatistics] = []

    def store_grams(number: int, statistics: list[InputStatistics]) -> None:
        for inputs in statistics:
            key = f"gram-{start}-{inputs.key}"
            if key not in store:  # an interrupted run may have stored this matrix
                store.put(key, inputs.gram)
            stored.append(StoredStatistics(number, key, inputs.regions, inputs.n))

    sums = measure(running.engine, windows, start, seed, store.folder, store_grams, progress)
    return sums, stored
