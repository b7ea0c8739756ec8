"""Run any causal language model of transformers with one block in memory, forwards and backwards."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from freebits.checkpoint import Source
from freebits.errors import UnsupportedModelError
from freebits.huggingface.blocks import FactoredEmbedding

BUILDING = threading.Lock()
"""Making a model changes what holds for all threads: transformers sets PyTorch's dtype, we how parameters are made."""
Run = Callable[[Tensor], Tensor]
"""A block: the stream before it, (1, T, D), to the stream after it."""


class BlockwiseModel:
    """A causal language model whose blocks are read when they are wanted. In float32, without gradients of weights.

    Attributes:
        device: where it runs.
        blocks: names of its blocks.
        embedding: name of the token embedding.
        head: name of the output head; that of the embedding where they are one.

    Args:
        source: its tensors.
        config: what transformers makes of its config.
        device: where to run.

    Raises:
        UnsupportedModelError: there is no stack of blocks in it, or its tensors have other names than in transformers.
    """

    def __init__(self, source: Source, config: PreTrainedConfig, device: torch.device) -> None:
        self.device = device
        self._source = source
        self._config = config
        self._model = dense_model(config)
        self._loaded: int | None = None
        self._is_filled = False
        stacks = [
            (name, module)
            for name, module in self._model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
        ]
        if not stacks:
            raise UnsupportedModelError(f"a model of type {config.model_type!r} has no stack of blocks to work through")
        stack, layers = stacks[0]
        self.blocks = tuple(f"{stack}.{number}" for number in range(len(layers)))
        self._blocks = list(layers)
        names = {id(module): name for name, module in self._model.named_modules()}
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        self.embedding = f"{names[id(embedding)]}.weight"
        self._tied = head.weight is embedding.weight
        self.head = self.embedding if self._tied else f"{names[id(head)]}.weight"
        self._model.set_submodule(stack, nn.ModuleList(Recorder(layer) for layer in layers))
        self._recorders: list[Recorder] = list(self._model.get_submodule(stack))
        for name, _ in self._model.named_parameters():  # a tied head's is the embedding's
            self._checked(name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without any weights, but with the context in which blocks run."""
        contexts = [(recorder.args, recorder.kwargs, recorder.as_tuple) for recorder in self._recorders]
        return _again, (self._source, self._config, self.device, contexts)

    def matrices(self, block: int) -> dict[str, Tensor]:
        """What a block multiplies by, by name: weights of linear layers, and `name[3]` of a stack of experts."""
        found: dict[str, Tensor] = {}
        for name, module in self._blocks[block].named_modules():
            for key, tensor in module._parameters.items():
                full = f"{self.blocks[block]}.{name}.{key}"
                if tensor is not None and tensor.ndim == 3:
                    found |= {f"{full}[{number}]": matrix for number, matrix in enumerate(tensor)}
                elif tensor is not None and key == "weight" and isinstance(module, (nn.Linear, Conv1D)):
                    found[full] = tensor
        return found

    @property
    def transposed(self) -> set[str]:
        """The matrices that are stored as (inputs, outputs), as GPT-2 has them."""
        layers = (
            (stack, layer)
            for stack, block in zip(self.blocks, self._blocks, strict=True)
            for layer in block.named_modules()
        )
        return {f"{stack}.{name}.weight" for stack, (name, module) in layers if isinstance(module, Conv1D)}

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Iterator[Tensor]:
        """The stream before the first block, (1, T, D), of each window of tokens, (windows, T)."""
        self._fill_around()
        run = self.block(0)
        self._run_until(0, tokens[:1])  # how a block gives its result, it knows after one has run
        run(self._recorders[0].stream)
        for window in tokens.split(1):
            self._run_until(-1, window)
            yield self._recorders[0].stream

    def _run_until(self, block: int, tokens: Tensor) -> None:
        """Up to a block; what comes after the last may want a stream of another width, in a sliced model."""
        self._recorders[block].stops = True
        with suppress(_Stopped):
            self._model.base_model(input_ids=tokens.to(self.device), use_cache=False)
        self._recorders[block].stops = False

    def block(self, number: int) -> Run:
        """A block, in memory until another one is, in the context of the windows embedded last."""
        block, recorder = self._blocks[number], self._recorders[number]
        if self._loaded != number:
            self.unload()
            self._fill(block, self.blocks[number])
            self._loaded = number

        def run(x: Tensor) -> Tensor:
            result = block(x, *recorder.args, **recorder.kwargs)
            for other in self._recorders:
                other.as_tuple = isinstance(result, tuple)
            stream: Tensor = result[0] if isinstance(result, tuple) else result
            return stream

        return run

    def unload(self) -> None:
        """Have no block in memory."""
        if self._loaded is not None:
            self._blocks[self._loaded].to("meta")
        self._loaded = None

    def logits(self, x: Tensor, window: Tensor) -> Tensor:
        """(T, V), for the stream after the last block, (1, T, D), of a window (T,)."""
        self._fill_around()
        self._recorders[-1].substitute = x
        result: Tensor = self._model(input_ids=window[None].to(self.device), use_cache=False).logits[0]
        self._recorders[-1].substitute = None
        return result

    @property
    def embedding_factor(self) -> Tensor | None:
        """What leads from the embedding to a stream of another width, (D, k), float64, in a sliced model with a tie."""
        self._fill_around()
        embedding = self._model.get_input_embeddings()
        return embedding.factor.detach().double().cpu() if isinstance(embedding, FactoredEmbedding) else None

    @property
    def head_module(self) -> nn.Module:
        """Whose inputs are the final hidden states."""
        module: nn.Module = self._model.get_output_embeddings()
        return module

    def _fill_around(self) -> None:
        """Read what is no block's: embeddings, norms, head."""
        if self._is_filled:
            return
        self._is_filled = True
        head = self.head_module
        if self._tied:
            head._parameters["weight"] = None
        self._fill(self._model, "")
        if self._tied:
            head.weight = self._model.get_input_embeddings().weight

    def _checked(self, name: str) -> str:
        if name not in self._source.kinds:
            raise UnsupportedModelError(f"its tensors have other names than in transformers: no {name}")
        return name

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Read the tensors of a module that are on no device yet, and buffers that are stored."""
        for path, inner in module.named_modules():
            for key, tensor in (*inner._parameters.items(), *inner._buffers.items()):
                name = ".".join(part for part in (prefix, path, key) if part)
                if isinstance(tensor, nn.Parameter):
                    read = self._source[self._checked(name)].to(self.device, torch.float32)
                    inner._parameters[key] = nn.Parameter(read.reshape(tensor.shape), requires_grad=False)
                elif tensor is not None and name in self._source.kinds:
                    inner._buffers[key] = self._source[name].to(self.device)


def _again(
    source: Source,
    config: PreTrainedConfig,
    device: torch.device,
    contexts: list[tuple[tuple[Any, ...], dict[str, Any], bool]],
) -> BlockwiseModel:
    """The same model in another process."""
    model = BlockwiseModel(source, config, device)
    for recorder, (args, kwargs, as_tuple) in zip(model._recorders, contexts, strict=True):
        recorder.args, recorder.kwargs, recorder.as_tuple = args, kwargs, as_tuple
    return model


def dense_model(config: PreTrainedConfig) -> Any:
    """The library's model, to run in float32, its parameters without memory."""
    with BUILDING, _parameters_on_meta():
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        config._experts_implementation = "eager"  # one after another, so that each can be watched
        return kind(config).to(torch.float32).eval()


class _Stopped(Exception):  # noqa: N818  (no error)
    pass


class Recorder(nn.Module):
    """Stands where a block was: keeps the stream and the context it is given, and hands on that stream or another."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._theirs = [block]  # in a list, so that it is no child
        self.stream = torch.empty(0)
        self.substitute: Tensor | None = None
        self.as_tuple = False
        """Whether the block gives its stream in a tuple."""
        self.stops = False
        """Whether the model runs no further than here."""
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    @property
    def context(self) -> dict[str, Any]:
        """What the block was given beside the stream, by the names it has for it."""
        theirs: Any = self._theirs[0]
        return {**self.kwargs, **dict(zip(theirs.arguments, self.args, strict=False))}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Keep what is given."""
        if args:
            self.stream, self.args = args[0], args[1:]
        else:
            self.stream, self.args = kwargs.pop("hidden_states"), ()
        self.kwargs = kwargs
        if self.stops:
            raise _Stopped
        stream = self.stream if self.substitute is None else self.substitute
        return (stream,) if self.as_tuple else stream

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a model asks of its blocks, such as the kind of their attention
            return getattr(self.__dict__["_theirs"][0], name)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made here have parameters without memory, but their buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is tied is there already
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
