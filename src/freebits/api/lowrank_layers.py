"""Choose ranks for a model's linear layers and find the low-rank factors, layer by layer.

Each layer is calibrated on the outputs of the low-rank layers before it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from freebits.calibration.groups import RunningModel, measure_group
from freebits.calibration.observers import Product, Products
from freebits.calibration.sensitivities import RecentInputs, fisher_information, gram
from freebits.errors import UnsupportedModelError, UsageError
from freebits.execution.progress import Progress
from freebits.execution.work_store import Work
from freebits.integrations.naming import TransformersView
from freebits.models.architecture import Architecture
from freebits.options import PAPER, SLOPE
from freebits.storage.checkpoint import Checkpoint
from freebits.transforms.low_rank import allocated, rank_for, reduced, spectrum
from freebits.types import FLOATS

PAPER_SETTINGS = {0.9: (8, 0.60), 0.8: (12, 0.46), 0.5: (24, 0.33)}
"""Value of `budget` → the settings of arXiv 2312.07046 for a model with 32 blocks.

The settings are the number of blocks to reduce, which are the last of the model, and the fraction of each of their
matrices to keep.
"""
_LAYERS = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Layers:
    """The linear layers that can become low-rank.

    Attributes:
        source: the model's tensors, under their names in transformers.
        architecture: table of the model's tensors.
        running: the same model, ready to run.
        sizes: index of a block → name of a matrix → (number of outputs, number of inputs). It contains the matrices
            that can be reduced.
        transposed: names of the matrices that are stored as (inputs, outputs), as in GPT-2.
    """

    source: TransformersView
    architecture: Architecture
    running: RunningModel
    sizes: Mapping[int, Mapping[str, tuple[int, int]]]
    transposed: frozenset[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: Path, device: torch.device, blocks: str) -> "Layers":
        """Return the layers in the chosen blocks of a model.

        Raises:
            UsageError: `blocks` is malformed, or names more blocks than the model has.
            UnsupportedModelError: the model already has low-rank layers, or its type is unknown; see `family_of`.
        """
        architecture = Architecture.of(checkpoint.config, len(checkpoint.specs))
        if architecture.low_ranks:
            raise UnsupportedModelError(f"{path} already has low-rank layers: reduce the model it was made from")
        running = RunningModel(path, device)
        source, engine = running.named, running.engine
        named_modules = engine.model.named_modules()
        layers = {f"{name}.weight": module for name, module in named_modules if isinstance(module, _LAYERS)}
        transposed = frozenset(name for name, layer in layers.items() if isinstance(layer, Conv1D))
        match = re.fullmatch(r"all|last:([1-9]\d*)", blocks)
        n_blocks = len(engine.blocks)
        if not match or int(match[1] or 1) > n_blocks:
            raise UsageError(f"`blocks` is {blocks!r}: give 'all', or 'last:N' for the last N of the {n_blocks} blocks")
        chosen = range(n_blocks - int(match[1]) if match[1] else 0, n_blocks)
        per_block = len(architecture.family.sublayers)
        sizes = {}
        for number in chosen:
            sublayers = architecture.sublayers[number * per_block : (number + 1) * per_block]
            branches = [branch for sublayer in sublayers for branch in sublayer.branches]
            modules = [module for branch in branches for module in (*branch.reads, *branch.writes)]
            specs = {module.weight: source.specs.get(module.weight) for module in modules if not module.stacked}
            shapes = {name: spec.shape for name, spec in specs.items() if spec and spec.dtype_name in FLOATS}
            shapes = {name: shape[::-1] if name in transposed else shape for name, shape in shapes.items()}
            sizes[number] = {
                name: (shape[0], shape[1]) for name, shape in shapes.items() if name in layers and min(shape) > 1
            }
        return cls(source, architecture, running, sizes, transposed)

    def matrix(self, name: str) -> Tensor:
        """Return a matrix as (outputs, inputs)."""
        return self.source[name].T if name in self.transposed else self.source[name]

    @property
    def all_sizes(self) -> dict[str, tuple[int, int]]:
        """Name of a matrix → (number of outputs, number of inputs), for all matrices that can be reduced."""
        return {name: size for block in self.sizes.values() for name, size in block.items()}


def choose_ranks(
    layers: Layers,
    tokens: Tensor,
    work: Work,
    plan: tuple[float, int | None, str],
    seed: int,
    progress: Progress,
) -> dict[str, int]:
    """Return name of a matrix → rank, for each layer that becomes low-rank.

    Args:
        layers: the layers that can become low-rank.
        tokens: the calibration text, (windows, T), int64.
        work: store of the spectra and the ranks.
        plan: (`budget`, `target_size`, `allocate`) as in `lowrank`.
        seed: seed for sampling labels; see `freebits.calibration.sensitivities.measure`.
        progress: callback, called after each block of the measurement.
    """
    budget, target_size, allocate = plan
    sizes = layers.all_sizes
    spectra: dict[str, Tensor] = {}
    if allocate == SLOPE and not work.has("ranks"):
        spectra = work.once("spectra", partial(_spectra, layers, tokens, work, seed, progress))

    def ranks_for(fraction: float) -> dict[str, int]:
        if allocate == SLOPE:
            return allocated(spectra, {name: sizes[name] for name in spectra}, fraction)
        if allocate == PAPER:
            return _paper_ranks(layers, fraction)
        return {name: rank_for(*size, fraction) for name, size in sizes.items()}

    def chosen() -> dict[str, int]:
        if target_size is not None:
            return _ranks_for_size(layers, ranks_for, target_size)
        return {name: rank for name, rank in ranks_for(budget).items() if rank}

    return work.once("ranks", chosen)


def _spectra(layers: Layers, tokens: Tensor, work: Work, seed: int, progress: Progress) -> dict[str, Tensor]:
    """Return name of a matrix → its `spectrum`, with outputs weighted by their Fisher information."""
    sizes = layers.all_sizes
    sums, statistics = measure_group(layers.running, work.store, seed, (0, tokens), progress)
    information = fisher_information(sums, [region for inputs in statistics for region in inputs.regions])
    spectra: dict[str, Tensor] = {}
    for inputs in statistics:
        regions = {region.name: region for region in inputs.regions if region.name in sizes and region in information}
        total = work.store.get(inputs.key) if regions else torch.empty(0)
        spectra |= {name: spectrum(layers.matrix(name), total, information[region]) for name, region in regions.items()}
        work.store.drop(inputs.key)
    return {name: spectra[name] for name in sizes if name in spectra}


def _paper_ranks(layers: Layers, budget: float) -> dict[str, int]:
    """Return the ranks of arXiv 2312.07046, which keep the same fraction of each matrix in the last blocks.

    The paper names a number of blocks to reduce in a model with 32 blocks. Other models get the same share of blocks.
    """
    n_of_32, fraction = PAPER_SETTINGS[budget]
    n_blocks = len(layers.running.engine.blocks)
    chosen = range(n_blocks - round(n_of_32 / 32 * n_blocks), n_blocks)
    blocks = [block for number, block in layers.sizes.items() if number in chosen]
    return {name: rank_for(*size, fraction, paired=False) for block in blocks for name, size in block.items()}


def _ranks_for_size(layers: Layers, ranks_for: Callable[[float], dict[str, int]], target: int) -> dict[str, int]:
    """Find by bisection the largest ranks with which the weights take at most `target` bytes.

    Raises:
        UsageError: the weights take more than `target` bytes even with the smallest ranks.
    """
    specs, sizes = layers.source.specs, layers.all_sizes
    dense_bytes = sum(spec.n_bytes for spec in specs.values())

    def total(chosen: Mapping[str, int]) -> int:
        saved = 0
        for name, rank in chosen.items():
            if rank:
                n, m = sizes[name]
                saved += specs[name].n_bytes // (n * m) * (n * m - rank * (n + m))
        return dense_bytes - saved

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if total(ranks_for(middle)) <= target else (low, middle)
    chosen = ranks_for(low) if low else {}
    if not low or total(chosen) > target:
        raise UsageError(
            f"`target_size` is {target}, but a model of {dense_bytes} bytes is larger even with the smallest ranks: "
            "give a larger size"
        )
    return {name: rank for name, rank in chosen.items() if rank}


@torch.no_grad()
def reduce_layers(layers: Layers, ranks: Mapping[str, int], tokens: Tensor, work: Work, progress: Progress) -> None:
    """Find the two factors of each layer, given the outputs of the low-rank layers before it.

    `work` stores the factors `down: (rank, inputs)` and `up: (outputs, rank)` as the result of stage `factors-NAME`.
    """
    engine, recent = layers.running.engine, RecentInputs()
    reducer = partial(_low_rank, layers, ranks, work, recent)

    def finish_block(number: int) -> None:
        recent.clear()
        progress("reducing", "block", number + 1, len(engine.runs))

    with Products(engine.find_parameter, reducer):
        engine.hidden(tokens, finish_block)


def _low_rank(
    layers: Layers, ranks: Mapping[str, int], work: Work, recent: RecentInputs, product: Product
) -> Tensor | None:
    """Return the result of a product in its low-rank layer; None if the layer stays unchanged."""
    name, x = product.region.name, product.inputs
    if name not in ranks:
        return None

    def find() -> tuple[Tensor, Tensor]:
        total = recent.get(x)
        if total is None:
            total = gram(x).double().cpu()
            recent.add(x, total)
        matrix = layers.matrix(name)
        down, up = reduced(matrix, total, ranks[name])
        return down.to(matrix.dtype).contiguous(), up.to(matrix.dtype).contiguous()

    down, up = (factor.to(x.device, torch.float32) for factor in work.once(f"factors-{name}", find))
    difference = up @ down - layers.matrix(name).to(x.device, torch.float32)
    return product.result + (x @ difference.T).reshape(product.result.shape)
