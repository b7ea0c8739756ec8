"""Run a dense model for calibration with the library's own modules, one block in memory."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig

from freebits.architecture import Architecture
from freebits.huggingface.blocks import residual_block
from freebits.huggingface.blockwise import Recorder, dense_model


class BlockRunner:
    """A dense model whose blocks are folded and lie in memory one at a time. Implements `freebits.calibration.Runner`.

    Args:
        config: what transformers makes of the dense model's.
        architecture: what is in it.
        device: where to run, in float32.
    """

    def __init__(self, config: PreTrainedConfig, architecture: Architecture, device: torch.device) -> None:
        self.device = device
        self._architecture = architecture
        self._model = dense_model(config)
        layers: Any = self._model.get_submodule(architecture.family.blocks)
        self._blocks = [residual_block(layer, architecture.family) for layer in layers]
        self._recorders = [Recorder(block) for block in self._blocks]
        self._model.set_submodule(architecture.family.blocks, nn.ModuleList(self._recorders))
        for recorder in self._recorders:
            recorder.as_tuple = architecture.family.in_tuple
        self._number = 0
        self._config = config
        self.loaded: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Without any weights, but with the context in which blocks run."""
        contexts = [(recorder.args, recorder.kwargs) for recorder in self._recorders]
        return _again, (self._config, self._architecture, self.device, contexts)

    @torch.no_grad()
    def embed(self, tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """The stream before the first block, (windows, T, D), float32, for tokens (windows, T)."""
        self._fill(tensors)
        norm = self._architecture.final_norm
        self._fill({norm.weight: torch.ones(()), norm.bias: torch.zeros(())})  # whose result nobody sees
        streams = []
        for window in tokens.to(self.device).split(1):
            self._model.base_model(input_ids=window, use_cache=False)
            streams.append(self._recorders[0].stream.cpu())
        for recorder in self._recorders:
            recorder.stream = torch.empty(0)
        return torch.cat(streams)

    @torch.no_grad()
    def load(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Take over the folded tensors of block number `block`; its shortcuts stay identities."""
        self.loaded = None
        self._blocks[self._number].to("meta")
        self._number = block
        shortcuts = {sub.shortcut.weight for sub in self._architecture.sublayers}
        norms = [norm for sub in self._architecture.parts[1 + block].sublayers for norm in sub.norms]
        bare = {norm.weight: torch.ones(()) for norm in norms} | {norm.bias: torch.zeros(()) for norm in norms}
        self._fill(bare | {name: tensor for name, tensor in tensors.items() if name not in shortcuts})
        self.loaded = block

    @torch.no_grad()
    def run(self, sublayer: int, x: Tensor) -> Tensor:
        """The stream after the loaded block's `sublayer`, (1, T, D)."""
        context = self._recorders[self._number].context
        return self._blocks[self._number].run(sublayer, x.to(self.device), **context).cpu()

    @torch.no_grad()
    def losses(self, tensors: Mapping[str, Tensor], x: Tensor, tokens: Tensor) -> list[float]:
        """Mean negative log-likelihood, in nats, of each window's tokens after the first.

        Args:
            tensors: the embeddings, the final norm and the head, unless the token embedding is the head.
            x: the stream after the last block, (windows, T, D).
            tokens: (windows, T).
        """
        norm, head, embedding = (getattr(self._architecture, name) for name in ("final_norm", "head", "embedding"))
        weight = tensors[head.weight if head.weight in tensors else embedding.weight]
        self._fill({name: tensors[name] for name in (norm.weight, norm.bias, head.bias) if name in tensors})
        self._fill({head.weight: weight})
        embeddings = {name: of for name, of in tensors.items() if name in self._architecture.parts[0].weights}
        self._fill({name: of for name, of in embeddings.items() if self._model.get_parameter(name).is_meta})
        losses = []
        for stream, window in zip(x, tokens.to(self.device), strict=True):
            self._recorders[-1].substitute = stream[None].to(self.device)
            logits = self._model(input_ids=window[None], use_cache=False).logits[0, :-1]
            losses.append(cross_entropy(logits, window[1:]).item())
        self._recorders[-1].substitute = None
        return losses

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Give modules of the model, or of the block that is loaded, their tensors."""
        prefix = f"{self._architecture.family.blocks}.{self._number}."
        for name, tensor in tensors.items():
            inside = name.startswith(prefix)
            path, _, key = name.removeprefix(prefix if inside else "").rpartition(".")
            module = (self._blocks[self._number] if inside else self._model).get_submodule(path)
            empty = module._parameters.get(key)
            if key in module._buffers:
                module._buffers[key] = tensor.to(self.device, torch.float32)
            elif empty is not None:
                shape = empty.shape if tensor.ndim == 0 else tensor.shape
                wide = torch.empty(shape, device=self.device).copy_(tensor)
                module._parameters[key] = nn.Parameter(wide, requires_grad=False)


def _again(
    config: PreTrainedConfig,
    architecture: Architecture,
    device: torch.device,
    contexts: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> BlockRunner:
    """A runner in another process."""
    runner = BlockRunner(config, architecture, device)
    for recorder, (args, kwargs) in zip(runner._recorders, contexts, strict=True):
        recorder.args, recorder.kwargs = args, kwargs
    return runner
