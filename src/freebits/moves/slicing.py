"""Slice a dense model (SliceGPT, Ashkboos et al. 2024), one block in memory at a time.

Slicing is a rotation into principal axes that keeps the first `k` of them. Each block is calibrated on the
output of the part sliced before it: the dense sublayer runs on the stream projected onto the kept axes,
which is what the sliced sublayer computes, seen in the dense basis.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from freebits.architecture import Architecture, Layout, Part
from freebits.calibration import Runner, covariance, perplexity, principal_axes
from freebits.checkpoint import Source
from freebits.errors import CheckpointError, UsageError
from freebits.moves.move import Dtypes, Turn
from freebits.symmetry import fold_embeddings, fold_head, fold_sublayers, random_orthogonal
from freebits.work import Crew, kept

SIZE_STEP = 8
_AT_ONCE = 4096
"""Tokens of a chunk, which is the least that a member of the crew works on."""


def sliced_size(hidden_size: int, sparsity: float) -> int:
    """`k`: the width left at a sliced site, `floor((1 - sparsity) D)` rounded down to a multiple of 8.

    Raises:
        UsageError: `sparsity` lies outside [0, 1), or leaves nothing.
    """
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity {sparsity} lies outside [0, 1): 0.2 removes a fifth of the hidden size")
    exact = round((1 - sparsity) * hidden_size, 6)  # 0.2 * 320 is 64, not 63.99…
    size = math.floor(exact) // SIZE_STEP * SIZE_STEP if sparsity else hidden_size
    if size == 0:
        raise UsageError(f"sparsity {sparsity} leaves nothing of hidden size {hidden_size}: choose a smaller one")
    return size


@kept
@dataclass(frozen=True)
class Chunk:
    """Some windows of text, and how far calibration has come with them.

    Attributes:
        tokens: (windows, T).
        x: the sliced model's stream at the site reached, (windows, T, D).
        dense: of held-out windows the dense model's, too; None for those that are calibrated on.
    """

    tokens: Tensor
    x: Tensor
    dense: Tensor | None


@dataclass(frozen=True)
class Stream:
    """How far calibration has come.

    Attributes:
        held: the chunks, as the crew holds them; None for what lies on the desk.
        rotation: what the site reached is multiplied by, (D, width).
    """

    held: list[Any] | None
    rotation: Tensor


@dataclass(frozen=True)
class Slice:
    """The move, of a dense model.

    Attributes:
        source: the model.
        architecture: what is in it; `tied` if the sliced model is to keep the tie.
        runner: runs it.
        crew: whose members run some of the windows each.
        tokens: (windows, T), the calibration text.
        held_out: (windows, T), text on which to measure what slicing costs.
        size: `k`, the width to keep; see `sliced_size`.
        seed: where given, the kept subspace of each site is turned at random within itself.
    """

    source: Source
    architecture: Architecture
    runner: Runner
    crew: Crew
    tokens: Tensor
    held_out: Tensor
    size: int
    seed: int | None = None

    def begin(self) -> Stream:
        """The embedded text, and the rotation of site 0."""
        untied = self.architecture.with_tie(False)
        embedded = fold_embeddings(self._read(self.architecture.parts[0]), untied)
        at_once = max(1, _AT_ONCE // self.tokens.shape[1])
        chunks = [(tokens, True) for tokens in self.tokens.split(at_once)]
        chunks += [(tokens, False) for tokens in self.held_out.split(at_once)]
        streams = [
            Chunk(tokens, x, None if counts else x.clone())
            for tokens, counts in chunks
            for x in [self.runner.embed(embedded, tokens)]
        ]
        held = self.crew.hold("embedded", streams)
        return Stream(held, self._rotation(0, [_covariance(chunk, self.runner) for chunk in streams]))

    def look(self, part: Part) -> None:
        """Nothing: what a part needs depends on the parts before it."""

    def step(self, state: Stream, part: Part, seen: None, following: None) -> tuple[Stream, Turn]:  # noqa: ARG002
        """Fold a part, run the text through it, and find the axes of its sites."""
        number = self.architecture.parts.index(part)
        desk, key = self.crew.desk, f"turn-{number}"
        if desk is not None and desk.has(key) and self.crew.has_kept(f"stream-{number}", self._n_chunks):
            rotations, facts = desk.get(key)
            state = Stream(None, rotations[max(rotations)])
        elif desk is not None and desk.has(f"part-{number}"):
            return state, Turn()
        else:
            state, rotations, facts = self._stepped(state, part, number)
            if desk is not None:
                self.crew.keep(f"stream-{number}", state.held or [])
                desk.put(key, (rotations, facts))
                self._clear(number)
        return state, Turn(
            rotations, partial(_replaced, self.source, self.architecture, self.runner.device, part), facts=facts
        )

    def finish(self, part: Part, tensors: dict[str, Tensor], dtype: Dtypes) -> None:  # noqa: ARG002
        """Whether everything fits.

        Raises:
            CheckpointError: a rotated weight does not fit its dtype.
        """
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"tensor {name} does not fit {tensor.dtype} after slicing: choose a wider --dtype, unless the "
                    "dense model itself has weights that are not finite"
                )

    def _stepped(self, state: Stream, part: Part, number: int) -> tuple[Stream, dict[int, Tensor], dict[str, float]]:
        """The stream after a part, the rotations of its sites, and what was measured at the last."""
        held = state.held if state.held is not None else self.crew.kept(f"stream-{number - 1}", self._n_chunks)
        rotations = {self._site_before(part): state.rotation}
        for index, sub in enumerate(part.sublayers):
            run = partial(_run, self.source, self.architecture, self.runner, part, index, rotations[sub.site - 1])
            held, found = self.crew.spread(f"site-{sub.site}", run, held)
            rotations[sub.site] = self._rotation(sub.site, found)
        facts = {}
        if part is self.architecture.parts[-1] and len(self.held_out):
            measure = partial(_losses, self.source, self.architecture, self.runner)
            held, losses = self.crew.spread("losses", measure, held)
            of_both = zip(*(both for of in losses for both in of), strict=True)
            facts = dict(zip(("dense", "sliced"), map(perplexity, of_both), strict=True))
        return Stream(held, rotations[max(rotations)]), rotations, facts

    @property
    def _n_chunks(self) -> int:
        at_once = max(1, _AT_ONCE // self.tokens.shape[1])
        return sum(math.ceil(len(tokens) / at_once) for tokens in (self.tokens, self.held_out))

    def _clear(self, number: int) -> None:
        """Forget what nobody can need any more, who may be one part behind."""
        if self.crew.leads and self.crew.desk is not None and number > 1:
            before = number - 2
            self.crew.forget(f"stream-{before}")
            for sub in self.architecture.parts[before].sublayers:
                self.crew.forget(f"site-{sub.site}")
                self.crew.forget(f"axes-{sub.site}")
            if self.crew.desk.has(f"part-{before}"):
                self.crew.desk.drop(f"turn-{before}")

    def _read(self, part: Part) -> dict[str, Tensor]:
        return _tensors(self.source, part, self.runner.device)

    def _site_before(self, part: Part) -> int:
        if part.sublayers:
            return part.sublayers[0].site - 1
        return 0 if part is self.architecture.parts[0] else self.architecture.n_sites - 1

    def _rotation(self, site: int, covariances: list[Tensor | None]) -> Tensor:
        """Of a site. An unsliced one has nothing to choose: it stays."""
        D = self.architecture.hidden_size
        width = (Layout.sliced(self.architecture, self.size).widths or ())[site]
        if width == D:
            return torch.eye(D, dtype=torch.float64)
        return self.crew.agree(f"axes-{site}", partial(self._axes, site, width), covariances)

    def _axes(self, site: int, width: int, covariances: list[Tensor | None]) -> Tensor:
        """The principal ones of the stream; the covariances are added up in place."""
        total = torch.zeros((), dtype=torch.float64)
        for one in covariances:
            total = total if one is None else one.add_(total)
        kept_axes = principal_axes(total.to(self.runner.device), width).cpu()
        if self.seed is None:
            return kept_axes
        seed = self.seed * self.architecture.n_sites + site
        return kept_axes @ random_orthogonal(width, torch.Generator().manual_seed(seed))


def _run(
    source: Source,
    architecture: Architecture,
    runner: Runner,
    part: Part,
    index: int,
    rotation: Tensor,
    chunk: Chunk,
) -> tuple[Chunk, Tensor | None]:
    """A chunk after a sublayer of a block, and the covariance of its stream."""
    block = (part.sublayers[0].site - 1) // len(architecture.family.sublayers)
    if runner.loaded != block:
        runner.load(block, _folded(source, architecture, runner.device, part))
    axes = rotation.to(runner.device, torch.float32)
    x = torch.empty_like(chunk.x)
    for window, after in zip(chunk.x.split(1), x.split(1), strict=True):
        after.copy_(runner.run(index, (window.to(runner.device) @ axes) @ axes.T))
    dense = None if chunk.dense is None else torch.cat([runner.run(index, window) for window in chunk.dense.split(1)])
    after_it = Chunk(chunk.tokens, x, dense)
    return after_it, _covariance(after_it, runner)


def _covariance(chunk: Chunk, runner: Runner) -> Tensor | None:
    return covariance(chunk.x.flatten(0, 1).to(runner.device)).cpu() if chunk.dense is None else None


def _losses(
    source: Source, architecture: Architecture, runner: Runner, chunk: Chunk
) -> tuple[Chunk, list[tuple[float, float]]]:
    """What the dense and the sliced model lose on the windows of a chunk that is held out."""
    if chunk.dense is None:
        return chunk, []
    first, *_, last = architecture.parts
    tensors = _tensors(source, last, runner.device) | _tensors(source, first, runner.device)
    losses = [runner.losses(tensors, x, chunk.tokens) for x in (chunk.dense, chunk.x)]
    return chunk, list(zip(*losses, strict=True))


def _replaced(source: Source, architecture: Architecture, device: torch.device, part: Part) -> dict[str, Tensor | None]:
    """What stands in the place of a part's tensors: the folded ones."""
    folded = _folded(source, architecture, device, part)
    return dict.fromkeys(part.weights.keys() - folded.keys()) | folded


def _folded(source: Source, architecture: Architecture, device: torch.device, part: Part) -> dict[str, Tensor]:
    tensors = _tensors(source, part, device)
    if part == architecture.parts[0]:
        return fold_embeddings(tensors, architecture)
    if part.sublayers:
        return fold_sublayers(tensors, architecture, part.sublayers)
    head, embedding = architecture.head.weight, architecture.embedding.weight
    if not architecture.tied and head not in tensors:
        tensors[embedding] = source[embedding].to(device)
    return fold_head(tensors, architecture)


def _tensors(source: Source, part: Part, device: torch.device) -> dict[str, Tensor]:
    return {name: source[name].to(device) for name in part.weights if name in source.kinds}
