"""Find what stands in the place of a model's linear layers, one after another, each fed by those that are narrow."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from freebits.architecture import Architecture
from freebits.checkpoint import Checkpoint
from freebits.errors import UnsupportedModelError, UsageError
from freebits.huggingface.blockwise import BlockwiseModel, Run
from freebits.huggingface.naming import InMemory, known_config
from freebits.huggingface.sensitivities import Chunk, chunks_of, measure_sensitivities
from freebits.huggingface.watching import Linears, Sums, sum_up
from freebits.kind import FLOATS
from freebits.options import PAPER, SLOPE
from freebits.reduction import allocated, rank_for, reduced, spectrum
from freebits.work import Crew, Progress

PAPERS_BLOCKS = {0.9: (8, 0.60), 0.8: (12, 0.46), 0.5: (24, 0.33)}
"""Budget → how many of 32 blocks the paper reduces, the last, and the part that is left of each matrix there."""
Factors = dict[str, tuple[Tensor, Tensor]]
"""Matrix → the two in its place, `down` and `up`."""


@dataclass(frozen=True)
class Layers:
    """The linear layers that may become narrow.

    Attributes:
        source: the model, by the names of transformers.
        architecture: what is in it.
        model: the same, run block by block.
        sizes: for each block that may be reduced, outputs and inputs of each of its matrices.
    """

    source: InMemory
    architecture: Architecture
    model: BlockwiseModel
    sizes: Mapping[int, Mapping[str, tuple[int, int]]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: Path, device: torch.device, blocks: str) -> "Layers":
        """Those of a model.

        Raises:
            UsageError: there are no such blocks.
            UnsupportedModelError: the table does not know it.
        """
        architecture = Architecture.of(checkpoint.config, len(checkpoint.kinds))
        if architecture.low_ranks:
            raise UnsupportedModelError(f"{path} has layers of low rank already: reduce the model it was made from")
        config = known_config(checkpoint, path)
        source = InMemory(checkpoint, config)
        model = BlockwiseModel(source, config, device)
        match = re.fullmatch(r"all|last:([1-9]\d*)", blocks)
        n_blocks = len(model.blocks)
        if not match or int(match[1] or 1) > n_blocks:
            raise UsageError(f"--blocks {blocks}: give all, or last:N with N up to {n_blocks}")
        chosen = range(n_blocks - int(match[1]) if match[1] else 0, n_blocks)
        per_block = len(architecture.family.sublayers)
        sizes = {}
        for number in chosen:
            subs = architecture.sublayers[number * per_block : (number + 1) * per_block]
            modules = [module for sub in subs for branch in sub.branches for module in (*branch.reads, *branch.writes)]
            kinds = {module.weight: source.kinds.get(module.weight) for module in modules if not module.stacked}
            shapes = {name: kind.shape for name, kind in kinds.items() if kind and kind.code in FLOATS}
            shapes = {name: s[::-1] if name in model.transposed else s for name, s in shapes.items()}
            sizes[number] = {n: (s[0], s[1]) for n, s in shapes.items() if n in model.matrices(number) and min(s) > 1}
        return cls(source, architecture, model, sizes)

    def matrix(self, name: str) -> Tensor:
        """One, (outputs, inputs)."""
        return self.source[name].T if name in self.model.transposed else self.source[name]

    @property
    def all_sizes(self) -> dict[str, tuple[int, int]]:
        """Of all blocks."""
        return {name: size for of in self.sizes.values() for name, size in of.items()}


def ranks_of(
    layers: Layers,
    tokens: Tensor,
    crew: Crew,
    plan: tuple[float, int | None, str],
    seed: int,
    progress: Progress,
) -> dict[str, int]:
    """The rank of each layer that becomes narrow."""
    budget, target_size, allocate = plan
    sizes = layers.all_sizes
    spectra: dict[str, Tensor] = {}
    if allocate == SLOPE and not crew.has("ranks"):
        for part, found in measure_sensitivities(layers.model, tokens, crew, seed, progress):
            ours = {
                name: spectrum(layers.matrix(name), of.gram, of.information)
                for name, of in (found or {}).items()
                if name in sizes
            }
            spectra |= crew.agree(f"known-{part}", dict, ours)

    def ranks(part: float) -> dict[str, int]:
        if allocate == SLOPE:
            return allocated(spectra, {name: sizes[name] for name in spectra}, part)
        if allocate == PAPER:
            return _papers_ranks(layers, part)
        return {name: rank_for(*size, part) for name, size in sizes.items()}

    if target_size is None or crew.has("ranks"):
        return crew.agree("ranks", lambda _: {n: r for n, r in ranks(budget).items() if r}, None)
    return crew.agree("ranks", lambda _: _ranks_for_size(layers, ranks, target_size), None)


def _papers_ranks(layers: Layers, budget: float) -> dict[str, int]:
    """Of the last blocks, in proportion."""
    of_32, part = PAPERS_BLOCKS[budget]
    n_blocks = len(layers.model.blocks)
    chosen = range(n_blocks - round(of_32 / 32 * n_blocks), n_blocks)
    sizes = {name: size for number, of in layers.sizes.items() if number in chosen for name, size in of.items()}
    return {name: rank_for(*size, part, paired=False) for name, size in sizes.items()}


def _ranks_for_size(layers: Layers, ranks: Callable[[float], dict[str, int]], target: int) -> dict[str, int]:
    """Those with which the weights take at most so many bytes.

    Raises:
        UsageError: there are none.
    """
    kinds, sizes = layers.source.kinds, layers.all_sizes
    whole = sum(kind.n_bytes for kind in kinds.values())

    def total(chosen: Mapping[str, int]) -> int:
        saved = 0
        for name, rank in chosen.items():
            if rank:
                n, m = sizes[name]
                saved += kinds[name].n_bytes // (n * m) * (n * m - rank * (n + m))
        return whole - saved

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if total(ranks(middle)) <= target else (low, middle)
    chosen = ranks(low) if low else {}
    if not low or total(chosen) > target:
        raise UsageError(f"--target-size {target}: no rank is as small; the model has {whole} bytes")
    return {name: rank for name, rank in chosen.items() if rank}


def reduce_layers(layers: Layers, ranks: Mapping[str, int], tokens: Tensor, crew: Crew, progress: Progress) -> None:
    """Find what stands in the place of each layer; it lies on the desk, block by block."""
    model, n_blocks = layers.model, len(layers.model.blocks)
    chunks = chunks_of(model, tokens)
    held = crew.hold("reduced-0", chunks)
    crew.keep("reduced-0", held)
    for number in range(n_blocks):
        goes_on_here = crew.has_kept(f"reduced-{number + 1}", len(chunks))  # those of blocks before were forgotten
        if crew.has(f"factors-{number}") and (goes_on_here or crew.has(f"factors-{number + 1}")):
            held = []
        else:
            held = held or crew.kept(f"reduced-{number}", len(chunks))
            wanted = {name: ranks[name] for name in layers.sizes.get(number, {}) if name in ranks}
            found: Factors = {}
            while wanted:
                watch = partial(_watched, model, number, dict(found), tuple(wanted))
                held, sums = crew.spread(f"watched-{number}-{len(found)}", watch, held)
                grams = _first(sums)
                if not grams:
                    break  # experts that nothing came to
                found |= {n: _factors(layers, n, wanted[n], gram) for n, gram in grams.items()}
                wanted = {name: rank for name, rank in wanted.items() if name not in found}
            found = crew.agree(f"factors-{number}", dict, found)
            held, _ = crew.spread(f"through-{number}", partial(_through, model, number, found), held)
            crew.keep(f"reduced-{number + 1}", held)
            crew.forget(f"reduced-{number - 1}")  # which nobody can need who has shared in this block
        progress(number + 1, n_blocks)
    model.unload()


def _factors(layers: Layers, name: str, rank: int, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded as the layer's matrix is."""
    matrix = layers.matrix(name)
    down, up = reduced(matrix, gram, rank)
    return down.to(matrix.dtype).contiguous(), up.to(matrix.dtype).contiguous()


def _first(sums: list[dict[str, Sums]]) -> dict[str, Tensor]:
    """Of the matrices that were seen, those that read what the first read; the Gram matrix of that."""
    seen = {name: [of[name] for of in sums if name in of] for name in sorted({name for of in sums for name in of})}
    if not seen:
        return {}
    place = min(of[0].place for of in seen.values())
    leader = next(of[0].leader for of in seen.values() if of[0].place == place)
    gram = sum(
        (one.gram.double() for one in seen[leader] if one.gram is not None), torch.zeros((), dtype=torch.float64)
    )
    return {name: gram for name, of in seen.items() if of[0].leader == leader}


def _run_of(model: BlockwiseModel, number: int, factors: Factors) -> Run:
    """A block, with layers narrow that are."""
    run = model.block(number)
    matrices = model.matrices(number)
    for name, (down, up) in factors.items():
        product = up.to(model.device, torch.float32) @ down.to(model.device, torch.float32)
        matrices[name].copy_(product.T if name in model.transposed else product)
    return run


@torch.no_grad()
def _watched(
    model: BlockwiseModel, number: int, factors: Factors, names: tuple[str, ...], chunk: Chunk
) -> tuple[Chunk, dict[str, Sums]]:
    """The same chunk; what matrices read in it."""
    run, matrices = _run_of(model, number, factors), model.matrices(number)
    with Linears({name: matrices[name] for name in names}) as linears:
        for window in chunk.x.split(1):
            run(window.to(model.device))
            sum_up(linears.watches.values())
    of = {id(watch): name for name, watch in linears.watches.items()}
    return chunk, {
        n: watch.sums(of[id(watch.first or watch)]) for n, watch in linears.watches.items() if watch.n_inputs
    }


@torch.no_grad()
def _through(model: BlockwiseModel, number: int, factors: Factors, chunk: Chunk) -> tuple[Chunk, None]:
    """A chunk after a block."""
    run = _run_of(model, number, factors)
    return replace(chunk, x=torch.cat([run(window.to(model.device)).cpu() for window in chunk.x.split(1)])), None
