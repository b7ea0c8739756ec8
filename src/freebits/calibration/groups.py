"""Run a model on groups of windows, in this process or another one."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.calibration.engine import Engine, opened_engine
from freebits.calibration.products import Region
from freebits.calibration.sensitivities import InputStatistics, Sums, measure
from freebits.execution.progress import Progress, silent
from freebits.execution.stored_values import kept
from freebits.execution.work_store import WorkStore
from freebits.integrations.naming import InMemory
from freebits.quantized_inputs.source import readable


@dataclass(frozen=True)
class RunningModel:
    """The model in a folder, opened where it is run: here, or in another process.

    Attributes:
        path: the folder.
        device: where to run.
    """

    path: Path
    device: torch.device

    @property
    def named(self) -> InMemory:
        """Its tensors by the names of transformers."""
        return self._opened[0]

    @property
    def engine(self) -> Engine:
        """What runs it."""
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[InMemory, Engine]:
        return opened_engine(readable(self.path), self.path, self.device)

    def __reduce__(self) -> tuple[Any, ...]:
        return RunningModel, (self.path, self.device)


@kept
@dataclass(frozen=True)
class StoredStatistics:
    """Inputs whose Gram matrix is in the store.

    Attributes:
        number: of the execution of a block after which they were complete.
        key: see `InputStatistics`.
        regions: see `InputStatistics`.
        n: see `InputStatistics`.
    """

    number: int
    key: str
    regions: tuple[Region, ...]
    n: int


def groups_of(tokens: Tensor, engine: Engine, at_once: int) -> list[tuple[int, Tensor]]:
    """Windows in as few equal groups as keep a block's activations small; each with the number of its first window.

    How many there are depends on the model and the text alone, never on the machine.
    """
    config = engine.model.config.get_text_config()
    width = getattr(config, "hidden_size", None) or max((shape[-1] for shape in engine.matrices.values()), default=1)
    in_blocks = [shape for name, shape in engine.matrices.items() if name.startswith(engine.blocks)]
    inner = max((max(shape[-2:]) for shape in in_blocks), default=width)
    n_tokens = max(tokens.shape[1], at_once // (4 * (3 * inner + 8 * width)))
    n_groups = -(-tokens.numel() // n_tokens)
    size = -(-len(tokens) // n_groups)
    return [(start, tokens[start : start + size]) for start in range(0, len(tokens), size)]


def measured_group(
    running: RunningModel, store: WorkStore, seed: int, group: tuple[int, Tensor], progress: Progress = silent
) -> tuple[Sums, list[StoredStatistics]]:
    """Measure one group of windows; Gram matrices go to the store.

    Args:
        running: the model.
        store: see above.
        seed: of the labels that are drawn.
        group: the number of its first window, and its windows, (windows, T).
        progress: called after each block, forwards and backwards.
    """
    start, windows = group
    listed: list[StoredStatistics] = []

    def finish(number: int, found: list[InputStatistics]) -> None:
        for inputs in found:
            key = f"gram-{start}-{inputs.key}"
            if key not in store:  # from a run that was stopped
                store.put(key, inputs.gram)
            listed.append(StoredStatistics(number, key, inputs.regions, inputs.n))

    sums = measure(running.engine, windows, start, seed, store.folder, finish, progress)
    return sums, listed
