"""Run a dense model for calibration with the library's own modules, one block in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import AutoConfig, AutoModelForCausalLM

from freebits.architecture import Architecture
from freebits.huggingface.blocks import residual_block
from freebits.huggingface.loading import one_line_errors


class BlockRunner:
    """A dense model of one block, whose weights are exchanged. Implements `freebits.calibration.Runner`.

    Args:
        path: the dense checkpoint's folder.
        architecture: what is in it.
        device: where to run, in float32.
    """

    def __init__(self, path: Path, architecture: Architecture, device: torch.device) -> None:
        self.device = device
        self._architecture = architecture
        self._family = architecture.family
        with one_line_errors(path, "model"):
            self._config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            self._config.num_hidden_layers = 1
            model: Any = AutoModelForCausalLM.from_config(self._config, dtype=torch.float32, trust_remote_code=False)
        self._model = model.to(device).eval()
        self._model.set_submodule(self._family.head, nn.Identity())
        layers: Any = self._model.get_submodule(self._family.blocks)
        self._layer_class = type(layers[0])
        self._block, self._number = residual_block(layers[0], self._family.sublayers), 0
        self._recorders = [_Recorder() for _ in range(architecture.n_blocks)]
        self._model.set_submodule(self._family.blocks, nn.ModuleList(self._recorders))
        self._config.num_hidden_layers = self._model.config.num_hidden_layers = architecture.n_blocks

    @torch.no_grad()
    def embed(self, tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """The stream before the first block, (windows, T, D), float32, for tokens (windows, T)."""
        for name, tensor in tensors.items():
            self._model.get_parameter(name).copy_(tensor)
        streams = []
        for window in tokens.to(self.device).split(1):
            self._model.base_model(input_ids=window, use_cache=False)
            streams.append(self._recorders[0].stream)
        for recorder in self._recorders:
            recorder.stream = torch.empty(0)
        return torch.cat(streams)

    @torch.no_grad()
    def load(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Take over the folded tensors of block number `block`; its shortcuts stay identities."""
        if self._kind(block) != self._kind(self._number):
            layer: Any = self._layer_class(self._model.config, layer_idx=block)
            self._block = residual_block(layer.float().to(self.device).eval(), self._family.sublayers)
        self._number = block
        prefix = f"{self._family.blocks}.{block}."
        shortcuts = {sub.shortcut.weight for sub in self._architecture.sublayers}
        for name, tensor in tensors.items():
            if name not in shortcuts:
                module, _, parameter = name.removeprefix(prefix).rpartition(".")
                getattr(self._block.get_submodule(module), parameter).copy_(tensor)

    @torch.no_grad()
    def run(self, sublayer: int, x: Tensor) -> Tensor:
        """The stream after the loaded block's `sublayer`, (1, T, D)."""
        return self._block.run(sublayer, x, **self._recorders[self._number].context)

    @torch.no_grad()
    def losses(self, tensors: Mapping[str, Tensor], x: Tensor, tokens: Tensor) -> list[float]:
        """Mean negative log-likelihood, in nats, of each window's tokens after the first.

        Args:
            tensors: the final norm and the head, or the token embedding where it is the head.
            x: the stream after the last block, (windows, T, D).
            tokens: (windows, T).
        """
        norm, head = self._architecture.final_norm, self._architecture.head
        for name in {norm.weight, norm.bias} & tensors.keys():
            self._model.get_parameter(name).copy_(tensors[name])
        weight = tensors[head.weight if head.weight in tensors else self._architecture.embedding.weight].float()
        losses = []
        for stream, window in zip(x, tokens.to(self.device), strict=True):
            logits = linear(self._model.get_submodule(norm.name)(stream[:-1]), weight)
            losses.append(cross_entropy(logits, window[1:]).item())
        return losses

    def _kind(self, block: int) -> tuple[str, ...]:
        """What the config says of a block alone: where blocks differ, it has lists with an entry for each."""
        n_blocks = self._architecture.n_blocks
        lists = (v for v in self._config.to_dict().values() if isinstance(v, list) and len(v) == n_blocks)
        return tuple(str(values[block]) for values in lists)


class _Recorder(nn.Module):
    """Stands where a block was and keeps what it is given: the stream, and the attention's context."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = torch.empty(0)
        self.context: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        self.stream = hidden_states
        self.context = context
        return hidden_states
