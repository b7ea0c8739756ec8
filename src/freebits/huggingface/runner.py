"""Run a dense model for the slicer with the library's own modules, one block in memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from freebits.architecture import Architecture
from freebits.huggingface.blocks import residual_block
from freebits.huggingface.loading import understood


class BlockRunner:
    """A dense model of one block, whose weights are exchanged. Implements `freebits.slicing.Runner`.

    Args:
        path: the dense checkpoint's folder.
        architecture: what is in it.
        device: where to run, in float32.
    """

    def __init__(self, path: Path, architecture: Architecture, device: torch.device) -> None:
        self.device = device
        self._family = architecture.family
        with understood(path, "model"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            config.num_hidden_layers = 1
            self._model = (
                AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).to(device).eval()
            )
        self._model.set_submodule(self._family.head, nn.Identity())
        layers: Any = self._model.get_submodule(self._family.blocks)
        self._block = residual_block(layers[0], self._family.sublayers)
        self._recorder = _Recorder()
        layers[0] = self._recorder

    @torch.no_grad()
    def embed(self, tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """The stream before the first block, (windows, T, D), float32, for tokens (windows, T)."""
        for name, tensor in tensors.items():
            self._model.get_parameter(name).copy_(tensor)
        for window in tokens.to(self.device).split(1):
            self._model.base_model(input_ids=window, use_cache=False)
        streams, self._recorder.streams = self._recorder.streams, []
        return torch.cat(streams)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a block's folded tensors; its shortcuts stay identities."""
        for name, tensor in tensors.items():
            within_block = name.removeprefix(f"{self._family.blocks}.").partition(".")[2]
            module, _, parameter = within_block.rpartition(".")
            owner = self._block.get_submodule(module)
            if not isinstance(owner, nn.Identity):
                getattr(owner, parameter).copy_(tensor)

    @torch.no_grad()
    def run(self, sublayer: int, x: Tensor) -> Tensor:
        """The stream after the loaded block's `sublayer`, window by window."""
        return torch.cat([self._block.run(sublayer, window, **self._recorder.context) for window in x.split(1)])


class _Recorder(nn.Module):
    """Stands where the first block was and keeps what it is given: the stream, and the attention's context."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[Tensor] = []
        self.context: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        self.streams.append(hidden_states)
        self.context = context
        return hidden_states
