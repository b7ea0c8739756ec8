"""Find what stands in the place of a model's linear layers, one after another, each fed by those that are low-rank."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from freebits.calibration.groups import RunningModel, measured_group
from freebits.calibration.products import Product, Products
from freebits.calibration.sensitivities import Recent, gram, informations
from freebits.errors import UnsupportedModelError, UsageError
from freebits.execution.progress import Progress
from freebits.execution.work_store import Work
from freebits.integrations.naming import InMemory
from freebits.models.table import Architecture
from freebits.options import PAPER, SLOPE
from freebits.storage.folder import Checkpoint
from freebits.transforms.low_rank import allocated, rank_for, reduced, spectrum
from freebits.types import FLOATS

PAPERS_BLOCKS = {0.9: (8, 0.60), 0.8: (12, 0.46), 0.5: (24, 0.33)}
"""Budget → how many of 32 blocks the paper reduces, the last, and the part that is left of each matrix there."""
_LAYERS = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Layers:
    """The linear layers that may become narrow.

    Attributes:
        source: the model, by the names of transformers.
        architecture: what is in it.
        running: the same, as it is run.
        sizes: for each block that may be reduced, outputs and inputs of each of its matrices.
        transposed: the matrices that are stored as (inputs, outputs), as GPT-2 has them.
    """

    source: InMemory
    architecture: Architecture
    running: RunningModel
    sizes: Mapping[int, Mapping[str, tuple[int, int]]]
    transposed: frozenset[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: Path, device: torch.device, blocks: str) -> "Layers":
        """Those of a model.

        Raises:
            UsageError: there are no such blocks.
            UnsupportedModelError: the table does not know it.
        """
        architecture = Architecture.of(checkpoint.config, len(checkpoint.specs))
        if architecture.low_ranks:
            raise UnsupportedModelError(f"{path} has layers of low rank already: reduce the model it was made from")
        running = RunningModel(path, device)
        source, engine = running.named, running.engine
        layers = {f"{name}.weight": type(of) for name, of in engine.model.named_modules() if isinstance(of, _LAYERS)}
        transposed = frozenset(name for name, spec in layers.items() if issubclass(spec, Conv1D))
        match = re.fullmatch(r"all|last:([1-9]\d*)", blocks)
        n_blocks = len(engine.blocks)
        if not match or int(match[1] or 1) > n_blocks:
            raise UsageError(f"--blocks {blocks}: give all, or last:N with N up to {n_blocks}")
        chosen = range(n_blocks - int(match[1]) if match[1] else 0, n_blocks)
        per_block = len(architecture.family.sublayers)
        sizes = {}
        for number in chosen:
            subs = architecture.sublayers[number * per_block : (number + 1) * per_block]
            modules = [module for sub in subs for branch in sub.branches for module in (*branch.reads, *branch.writes)]
            specs = {module.weight: source.specs.get(module.weight) for module in modules if not module.stacked}
            shapes = {name: spec.shape for name, spec in specs.items() if spec and spec.code in FLOATS}
            shapes = {name: s[::-1] if name in transposed else s for name, s in shapes.items()}
            sizes[number] = {n: (s[0], s[1]) for n, s in shapes.items() if n in layers and min(s) > 1}
        return cls(source, architecture, running, sizes, transposed)

    def matrix(self, name: str) -> Tensor:
        """One, (outputs, inputs)."""
        return self.source[name].T if name in self.transposed else self.source[name]

    @property
    def all_sizes(self) -> dict[str, tuple[int, int]]:
        """Of all blocks."""
        return {name: size for of in self.sizes.values() for name, size in of.items()}


def ranks_of(
    layers: Layers,
    tokens: Tensor,
    work: Work,
    plan: tuple[float, int | None, str],
    seed: int,
    progress: Progress,
) -> dict[str, int]:
    """The rank of each layer that becomes narrow."""
    budget, target_size, allocate = plan
    sizes = layers.all_sizes
    spectra: dict[str, Tensor] = {}
    if allocate == SLOPE and not work.has("ranks"):
        spectra = work.once("spectra", partial(_spectra, layers, tokens, work, seed, progress))

    def ranks(part: float) -> dict[str, int]:
        if allocate == SLOPE:
            return allocated(spectra, {name: sizes[name] for name in spectra}, part)
        if allocate == PAPER:
            return _papers_ranks(layers, part)
        return {name: rank_for(*size, part) for name, size in sizes.items()}

    def chosen() -> dict[str, int]:
        if target_size is not None:
            return _ranks_for_size(layers, ranks, target_size)
        return {name: rank for name, rank in ranks(budget).items() if rank}

    return work.once("ranks", chosen)


def _spectra(layers: Layers, tokens: Tensor, work: Work, seed: int, progress: Progress) -> dict[str, Tensor]:
    """Of each layer what each direction of its outputs is worth."""
    sizes = layers.all_sizes
    sums, listed = measured_group(layers.running, work.store, seed, (0, tokens), progress)
    information = informations(sums, [region for of in listed for region in of.regions])
    spectra: dict[str, Tensor] = {}
    for of in listed:
        names = {region.name: region for region in of.regions if region.name in sizes and region in information}
        total = work.store.get(of.key) if names else torch.empty(0)
        spectra |= {n: spectrum(layers.matrix(n), total, information[region]) for n, region in names.items()}
        work.store.drop(of.key)
    return {name: spectra[name] for name in sizes if name in spectra}


def _papers_ranks(layers: Layers, budget: float) -> dict[str, int]:
    """Of the last blocks, in proportion."""
    of_32, part = PAPERS_BLOCKS[budget]
    n_blocks = len(layers.running.engine.blocks)
    chosen = range(n_blocks - round(of_32 / 32 * n_blocks), n_blocks)
    sizes = {name: size for number, of in layers.sizes.items() if number in chosen for name, size in of.items()}
    return {name: rank_for(*size, part, paired=False) for name, size in sizes.items()}


def _ranks_for_size(layers: Layers, ranks: Callable[[float], dict[str, int]], target: int) -> dict[str, int]:
    """Those with which the weights take at most so many bytes.

    Raises:
        UsageError: there are none.
    """
    specs, sizes = layers.source.specs, layers.all_sizes
    whole = sum(spec.n_bytes for spec in specs.values())

    def total(chosen: Mapping[str, int]) -> int:
        saved = 0
        for name, rank in chosen.items():
            if rank:
                n, m = sizes[name]
                saved += specs[name].n_bytes // (n * m) * (n * m - rank * (n + m))
        return whole - saved

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if total(ranks(middle)) <= target else (low, middle)
    chosen = ranks(low) if low else {}
    if not low or total(chosen) > target:
        raise UsageError(f"--target-size {target}: no rank is as small; the model has {whole} bytes")
    return {name: rank for name, rank in chosen.items() if rank}


@torch.no_grad()
def reduce_layers(layers: Layers, ranks: Mapping[str, int], tokens: Tensor, work: Work, progress: Progress) -> None:
    """Find the two matrices in the place of each layer; each layer reads what those before it then give.

    They are results of stages `factors-NAME`, (`down`, `up`).
    """
    engine, recent = layers.running.engine, Recent()
    reducer = partial(_low_rank, layers, ranks, work, recent)

    def left(number: int) -> None:
        recent.clear()
        progress("reducing", "block", number + 1, len(engine.runs))

    with Products(engine.parameter_at, reducer):
        engine.hidden(tokens, left)


def _low_rank(layers: Layers, ranks: Mapping[str, int], work: Work, recent: Recent, product: Product) -> Tensor | None:
    """The result of a product, once the layer is one of low rank."""
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
    change = up @ down - layers.matrix(name).to(x.device, torch.float32)
    return product.result + (x @ change.T).reshape(product.result.shape)
