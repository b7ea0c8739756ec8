"""Measure how much a model's output depends on each of its matrices: one pass forwards, one backwards."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from freebits.huggingface.blockwise import BlockwiseModel
from freebits.huggingface.own_text import drawn
from freebits.huggingface.watching import Linears, Sums, sum_up
from freebits.quantization import Sensitivity
from freebits.work import Crew, Progress, kept

_AT_ONCE = 4096
"""Tokens of a chunk, which is the least that a member of the crew works on."""
_TEMPER = 0.25
"""Power with which a token's frequency counts: a text tells which tokens are rare, not how rare they are elsewhere."""


@kept
@dataclass(frozen=True)
class Chunk:
    """Some windows, and the stream or the gradient there.

    Attributes:
        number: of the chunk.
        tokens: (windows, T).
        x: (windows, T, D).
    """

    number: int
    tokens: Tensor
    x: Tensor


def measure_sensitivities(
    model: BlockwiseModel, tokens: Tensor, crew: Crew, seed: int, progress: Progress
) -> Iterator[tuple[str, dict[str, Sensitivity] | None]]:
    """How much the output depends on the matrices of each block, from the last on, and then on embedding and head.

    Labels are drawn from the model's own predictions, so that squared gradients are its Fisher information.

    Args:
        model: the model.
        tokens: (windows, T), calibration text.
        crew: whose members run some of the windows each; the stream between blocks lies on its desk.
        seed: of the draw.
        progress: called after each block, forwards and backwards.

    Yields:
        A name for the part, and what was found; None where `known-name` lies on the desk already.
    """
    n_blocks, chunks = len(model.blocks), chunks_of(model, tokens)
    held = crew.hold("stream-0", chunks)
    crew.keep("stream-0", held)
    if not crew.has("head"):
        held = _forwards(model, crew, held, progress)
        measure = partial(_head, model, seed)
        held, sums = crew.spread("head-sums", measure, held)
        crew.keep(f"gradient-{n_blocks}", held)
        hidden, likely = crew.agree("head", _added, sums)
    else:
        held = []
        hidden, likely = crew.agree("head", _added, [])
    for number in reversed(range(n_blocks)):
        name = str(number)
        goes_on_here = crew.has_kept(f"gradient-{number}", len(chunks))  # those of blocks before were forgotten
        if crew.has(f"known-{name}") and (goes_on_here or crew.has(f"known-{number - 1}")):
            held = []
            yield name, None
        else:
            held = held or crew.kept(f"gradient-{number + 1}", len(chunks))
            streams = crew.kept(f"stream-{number}", len(chunks))
            held, seen = crew.spread(f"backward-{number}", partial(_backwards, model, number), held, streams)
            del streams
            crew.keep(f"gradient-{number}", held)
            yield name, _sensitivities(model.matrices(number).keys(), seen, tokens.numel())
        for stage in (f"stream-{number + 2}", f"backward-{number + 2}", f"gradient-{number + 3}"):
            crew.forget(stage)  # of which nobody is so far behind
        progress(2 * n_blocks - number, 2 * n_blocks)
    model.unload()
    held = held or crew.kept("gradient-0", len(chunks))
    _, grams = crew.spread("embedding", _outer, held)
    backwards = sum(grams[1:], grams[0])
    factor = model.embedding_factor
    if factor is not None:  # the gradient at what the embedding gives, from that at the stream
        backwards = factor @ backwards @ factor.T
    yield "embeddings", _embeddings(model, hidden, likely, backwards, tokens.numel())


def chunks_of(model: BlockwiseModel, tokens: Tensor) -> list[Chunk]:
    """Windows of tokens in chunks, with the stream before the first block."""
    parts = tokens.split(max(1, _AT_ONCE // tokens.shape[1]))
    return [Chunk(number, some, torch.cat(list(model.embed(some))).cpu()) for number, some in enumerate(parts)]


def _forwards(model: BlockwiseModel, crew: Crew, held: list[Any], progress: Progress) -> list[Any]:
    """The stream after the last block; that before each block lies on the desk."""
    n_blocks, n_chunks = len(model.blocks), len(held)
    for number in range(n_blocks):
        if crew.has_kept(f"stream-{number + 1}", n_chunks):
            held = []
        else:
            held = held or crew.kept(f"stream-{number}", n_chunks)
            held, _ = crew.spread(f"forward-{number}", partial(_forward, model, number), held)
            crew.keep(f"stream-{number + 1}", held)
        progress(number + 1, 2 * n_blocks)
    return held or crew.kept(f"stream-{n_blocks}", n_chunks)


def _forward(model: BlockwiseModel, number: int, chunk: Chunk) -> tuple[Chunk, None]:
    run = model.block(number)
    with torch.no_grad():
        x = torch.cat([run(window.to(model.device)).cpu() for window in chunk.x.split(1)])
    return replace(chunk, x=x), None


def _head(model: BlockwiseModel, seed: int, chunk: Chunk) -> tuple[Chunk, tuple[Tensor, Tensor, int]]:
    """The gradient at the stream; `Σ x xᵀ` over the head's inputs, how likely each token is, and of how many."""
    model.unload()
    generator = torch.Generator(model.device).manual_seed(seed + chunk.number)
    inputs: list[Tensor] = []
    gram: Any = 0
    likely: Any = 0
    handle = model.head_module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    gradients = []
    for window, x in zip(chunk.tokens, chunk.x.split(1), strict=True):
        leaf = x.to(model.device).clone().requires_grad_()
        logits = model.logits(leaf, window)[:-1]
        chances = logits.detach().softmax(-1)
        labels = drawn(chances, generator)[:, 0]
        gradients.append(torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), leaf)[0].cpu())
        likely = likely + (chances * (1 - chances)).sum(0)
        rows = inputs.pop().flatten(0, -2)
        gram = gram + rows.T @ rows
    handle.remove()
    return replace(chunk, x=torch.cat(gradients)), (gram.cpu(), likely.cpu(), chunk.tokens.numel())


def _added(sums: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """The means over all chunks."""
    grams, likely, counts = zip(*sums, strict=True)
    n_tokens = sum(counts)
    return sum(grams[1:], grams[0]) / n_tokens, sum(likely[1:], likely[0]) / n_tokens


def _backwards(model: BlockwiseModel, number: int, gradient: Chunk, stream: Chunk) -> tuple[Chunk, dict[str, Sums]]:
    """The gradient at a block's input, from that at its output; what was seen of its matrices."""
    gradients = []
    run = model.block(number)
    with Linears(model.matrices(number)) as linears:
        watches = linears.watches
        for x, g in zip(stream.x.split(1), gradient.x.split(1), strict=True):
            leaf = x.to(model.device).clone().requires_grad_()
            gradients.append(torch.autograd.grad(run(leaf), leaf, g.to(model.device))[0].cpu())
            sum_up(watches.values())
    names = {id(watch): name for name, watch in watches.items()}
    found = {n: watch.sums(names[id(watch.first or watch)]) for n, watch in watches.items() if watch.n_inputs}
    return replace(gradient, x=torch.cat(gradients)), found


def _sensitivities(names: Collection[str], sums: Sequence[Mapping[str, Sums]], n_tokens: int) -> dict[str, Sensitivity]:
    """What was seen in all chunks; the information is a mean over all tokens, Gram matrices over the inputs."""
    seen = {name: [of[name] for of in sums if name in of] for name in names}
    grams: dict[str, Tensor] = {}
    for name, of in seen.items():
        parts = [one.gram for one in of if one.gram is not None]
        if parts:
            grams[name] = sum(parts[1:], parts[0]) / sum(one.n_inputs for one in of)
    found = {
        name: Sensitivity(grams[of[0].leader], sum((one.squares for one in of[1:]), of[0].squares) / n_tokens)
        for name, of in seen.items()
        if of
    }
    for name in seen.keys() - found.keys():  # an expert to whom no token came: as another of its stack
        others = [other for other in found if other.rpartition("[")[0] == name.rpartition("[")[0] != ""]
        if others:
            least = min(others, key=lambda other: found[other].information.sum().item())
            found[name] = found[least]
    return found


def _outer(chunk: Chunk) -> tuple[None, Tensor]:
    """`Σ g gᵀ` over the gradients at the embedding."""
    gram = torch.zeros(chunk.x.shape[-1], chunk.x.shape[-1], dtype=torch.float64)
    for window in chunk.x:
        gram += (window.T @ window).double()
    return None, gram


def _embeddings(
    model: BlockwiseModel, hidden: Tensor, likely: Tensor, backwards: Tensor, n_tokens: int
) -> dict[str, Sensitivity]:
    """Of the head, and of the embedding, by row; where they are one matrix, of both together.

    A token's row counts as often as the token occurs, tempered so that the mean cost stays what it is.
    """
    likely = likely.double().cpu().clamp_min(torch.finfo(torch.float32).tiny)
    per_row = {model.embedding: backwards / n_tokens / len(likely)}
    of_head = hidden.double().cpu() * likely.mean()
    per_row[model.head] = of_head + per_row[model.embedding] if model.head == model.embedding else of_head
    tempered = likely**_TEMPER
    tempered *= (likely / tempered).mean()
    return {name: Sensitivity(gram / likely.mean(), tempered) for name, gram in per_row.items()}
