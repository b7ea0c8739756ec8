"""Run a dense model with folded norms, and observe the residual stream at each site, as slicing requires.

A site is the part of the residual stream before the first sublayer, between two sublayers, or after the last sublayer.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig

from freebits.calibration.engine import Engine, hidden_states
from freebits.models.architecture import Architecture, Part
from freebits.models.blocks import residual_block
from freebits.storage.checkpoint import Source
from freebits.transforms.folding import fold_embeddings
from freebits.transforms.slicing import AtSite, folded_part
from freebits.types import TensorSpec


class FoldedRunner:
    """A dense model with folded norms. Implements `freebits.transforms.slicing.Runner`.

    Args:
        source: tensors of the dense model.
        config: config of the model, parsed by transformers.
        architecture: architecture of the model.
        device: device on which the model runs, in float32.
    """

    def __init__(
        self, source: Source, config: PreTrainedConfig, architecture: Architecture, device: torch.device
    ) -> None:
        self.device = device
        self._architecture = architecture
        self._at_site: AtSite = lambda _, x: x
        self._engine = Engine(_FoldedSource(source, architecture, device), config, device, self._observe_sites)

    @torch.no_grad()
    def losses(self, tokens: Tensor, at_site: AtSite, n_measured: int) -> list[float]:
        """Return the losses, as `freebits.transforms.slicing.Runner` specifies."""
        self._at_site = at_site
        output = self._engine.hidden(tokens)
        losses = []
        with self._engine.head_loaded():
            for number in range(len(tokens) - n_measured, len(tokens)):
                logits = self._engine.run_head(output, hidden_states(output)[number : number + 1], tokens[number])
                losses.append(cross_entropy(logits[:-1], tokens[number, 1:].to(self.device)).item())
        self._at_site = lambda _, x: x
        return losses

    def _observe_sites(self, model: Any) -> None:
        """Convert the blocks of a model to residual blocks that pass the stream at each site to `_at_site`."""
        family = self._architecture.family
        for number, layer in enumerate(model.get_submodule(family.blocks)):
            block: Any = residual_block(layer, family)
            block.run = partial(self._run, number * len(family.sublayers), block.run)

    def _run(self, site: int, run: Callable[..., Tensor], index: int, x: Tensor, **context: Any) -> Tensor:
        """Run a sublayer window by window, and call `_at_site` after the sublayer.

        For the first sublayer of the model, also call `_at_site` before the sublayer.

        Args:
            site: site before the first sublayer of the block.
            run: function that runs a sublayer of the block.
            index: index of the sublayer in the block.
            x: residual stream before the sublayer, (windows, T, D).
            context: other arguments of the block.
        """
        if site + index == 0:
            x = self._at_site(0, x)
        output = torch.empty_like(x)
        for number in range(len(x)):
            output[number] = run(index, x[number : number + 1], **_for_window(context, number, len(x)))[0]
        return self._at_site(site + index + 1, output)


def _for_window(context: Any, number: int, n: int) -> Any:
    """Return the arguments of a block, except the residual stream, for one of `n` windows."""
    if isinstance(context, Tensor):
        return context[number : number + 1] if context.ndim and len(context) == n else context
    if isinstance(context, Mapping):
        return {key: _for_window(value, number, n) for key, value in context.items()}
    return tuple(_for_window(value, number, n) for value in context) if isinstance(context, tuple) else context


class _FoldedSource:
    """A source of the tensors of a dense model with folded norms, for `Engine`. The final norm is not folded."""

    def __init__(self, source: Source, architecture: Architecture, device: torch.device) -> None:
        self.config = source.config
        self._source = source
        self._architecture = architecture
        self._device = device
        self._last_folded: tuple[int, dict[str, Tensor]] = -1, {}
        self._part_numbers = {name: number for number, part in enumerate(architecture.parts) for name in part.weights}

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The specs of the dense tensors. The shape of tensors that only folding creates is given as ()."""
        head, embedding = self._architecture.head.weight, self._architecture.embedding.weight
        head_spec = {head: self._source.specs.get(head, self._source.specs[embedding])}
        return dict.fromkeys(self._part_numbers, TensorSpec("F32", ())) | dict(self._source.specs) | head_spec

    def __getitem__(self, name: str) -> Tensor:
        architecture, number = self._architecture, self._part_numbers.get(name, -1)
        if number == len(architecture.parts) - 1 or number < 0:
            if name == architecture.head.weight and name not in self._source.specs:
                return self._source[architecture.embedding.weight]
            return self._source[name]
        if self._last_folded[0] != number:
            part = architecture.parts[number]
            norms = [norm for sub in part.sublayers for norm in sub.norms]
            D = architecture.hidden_size
            neutral = {norm.weight: torch.ones(D) for norm in norms} | {norm.bias: torch.zeros(D) for norm in norms}
            fold = _folded_embeddings if number == 0 else folded_part
            self._last_folded = number, neutral | fold(self._source, architecture, self._device, part)
        return self._last_folded[1][name]


def _folded_embeddings(
    source: Source, architecture: Architecture, device: torch.device, part: Part
) -> dict[str, Tensor]:
    """Return the folded embeddings of the dense model. Fold as if the head were not tied to the embeddings."""
    tensors = {name: source[name].to(device) for name in part.weights if name in source.specs}
    return fold_embeddings(tensors, architecture.with_tie(False))
