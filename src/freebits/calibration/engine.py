"""Run a causal language model by the library's own forward and backward passes, with little of it in memory.

A block's weights are read when the block is entered: in the forward pass, and again when the backward pass recomputes
it (gradient checkpointing). They are dropped when it is left. The parameter object is replaced, so that what autograd
has saved stays as it is. A small model is held whole.

With `t` tokens in a batch, memory is about `t (3 d_ff + 8 d) 4 bytes + 3 blocks in float32`; the stream between blocks
lies on disk when it is large.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from freebits.calibration.products import Product, Products
from freebits.errors import CheckpointError, FreebitsError, UnsupportedModelError, one_line
from freebits.execution.machine import release_freed_memory
from freebits.integrations.empty_models import empty_model
from freebits.integrations.naming import InMemory, known_config
from freebits.storage.folder import Source

HELD_WHOLE = 2**30
"""Bytes in float32 up to which a model is held whole."""
_PROBE = 12
"""Tokens on which the model is tried first."""
Left = Callable[[int], None]
"""Called with the number of an execution of a block, when it is over: the first that runs is 0."""


class Engine:
    """A causal language model in float32, run as the library runs it. Its weights have no gradients.

    Attributes:
        model: the library's model; the weights that are not needed at the moment are on the meta device.
        device: where it runs.
        blocks: names of its blocks.
        runs: names of blocks in the order in which they are executed; one that is looped is there several times.
        used: parameter → number of the last execution of a block that multiplies by it.
        on_recompute: called when the backward pass comes to a block.
        embedding: name of the token embedding in `source`; None if there is none.
        head: name of the output head in `source`, that of the embedding if they are one; None if there is none.

    Args:
        source: its tensors, by the names of transformers.
        config: what transformers makes of its config.
        device: where to run.
        change: changes the library's model before its weights are read.
        held_whole: bytes in float32 up to which a model is held whole.
        spilled: bytes of the stream before all blocks above which it lies on disk.

    Raises:
        CheckpointError: a tensor is missing.
        UnsupportedModelError: transformers cannot run it on a text alone.
    """

    def __init__(
        self,
        source: Source,
        config: PreTrainedConfig,
        device: torch.device,
        change: Callable[[Any], None] = lambda _: None,
        *,
        held_whole: int = HELD_WHOLE,
        spilled: int = 2**30,
    ) -> None:
        self.model = empty_model(config)
        change(self.model)
        self.device = device
        self.used: dict[str, int] = {}
        self.runs: list[str] = []
        self._source = source
        self._spilled = spilled
        self.on_recompute: Callable[[], None] = _nothing
        self._left: Left | None = None
        self._entered = 0
        self._recomputes = False
        self._loaded: dict[int, tuple[str, Tensor]] = {}
        self._splits = True
        self._empty = dict(_all_parameters(self.model))
        self._origins = self._named_origins()
        embedding, self._head = _ends(self.model)
        self.embedding = self._origin_of(embedding)
        self.head = self._origin_of(self._head)
        self._fill_buffers()
        units = dict(_blocks(self.model))
        self.blocks = tuple(units)
        distinct = {self._origins[name]: tensor.numel() for name, tensor in self._empty.items()}
        self.held_whole = 4 * sum(distinct.values()) <= held_whole
        inside = tuple(f"{name}." for name in units)
        around = {} if self.held_whole else dict(_layers_around(self.model, inside))
        for name, module in around.items():
            self._empty[f"{name}.weight"] = module._parameters["weight"] = _placeholder(
                self._empty[f"{name}.weight"], device
            )
        for name, module in {**units, **around}.items():
            self._enclose(name, module, is_block=name in units)
        enclosed = () if self.held_whole else (*inside, *(f"{name}." for name in around))
        self._fill("", self.model, auxiliary=enclosed)
        if not self._probe() and around:  # the weight of a layer is used without the layer being called
            self._fill("", self.model, auxiliary=inside)
            self._probe()

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters of two dimensions and more, by their names in the source."""
        return {self._origins[name]: tuple(of.shape) for name, of in self._empty.items() if of.ndim > 1}

    def parameter_at(self, tensor: Any) -> tuple[str, Tensor] | None:
        """The parameter, by its name in the source, whose memory a tensor lies in; None while a block is recomputed."""
        if self._recomputes or not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return None
        return self._loaded.get(tensor.untyped_storage().data_ptr())

    @torch.no_grad()
    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """The logits for the tokens after the first of each window of a batch, (T - 1, V).

        Args:
            windows: (windows, T), int64.
        """
        output = self.hidden(windows)
        with self.head_loaded():
            for number, window in enumerate(windows):
                yield self.tail(output, _slice(first(output), number), window)[:-1]

    def hidden(self, windows: Tensor, left: Left | None = None) -> Any:
        """What the body of the model gives for a batch of windows, (windows, T), up to the head.

        Args:
            windows: (windows, T), int64.
            left: see `Left`.
        """
        self._left, self._entered = left, 0
        try:
            if not self._splits:
                return (self._called(windows),)
            with _body_replaced(self.model, _stop_after):
                try:
                    self._called(windows)
                except _Stopped as stopped:
                    return stopped.output
            raise UnsupportedModelError("its body was not called")
        finally:
            self._left = None

    def tail(self, output: Any, hidden: Tensor, window: Tensor) -> Tensor:
        """The logits of one window, (T, V), from the last hidden states of it, (1, T, D).

        Args:
            output: what `hidden` gave for the batch.
            hidden: the states; where a body and a head cannot be told apart these are the logits.
            window: (T,), int64.
        """
        if not self._splits:
            return hidden[0]
        with _body_replaced(self.model, lambda _: lambda *_, **__: _with_first(output, hidden)):
            logits: Tensor = self._called(window[None])[0]
        return logits

    @contextmanager
    def head_loaded(self) -> Iterator[None]:
        """Keep the head in memory, which is called for each window."""
        name = next((n for n, module in self.model.named_modules() if module is self._head), None)
        if self._head is None or name is None or self.held_whole:
            yield
            return
        with self._weights_of(name, self._head):
            yield

    @contextmanager
    def stream_on_disk(self, windows: Tensor, folder: Path) -> Iterator[None]:
        """For a forward and a backward pass: what is kept between blocks lies in a folder, if it is large."""
        width = getattr(self.model.config.get_text_config(), "hidden_size", 0)
        size = 4 * windows.numel() * width
        if size * len(self.runs) <= self._spilled:
            yield
            return
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            hooks = saved_tensors_hooks(_Spill(Path(scratch), size), _Spill.read)
            with hooks:
                yield

    def _called(self, windows: Tensor) -> Tensor:
        try:
            logits: Tensor = self.model(input_ids=windows.to(self.device), use_cache=False).logits
        except (FreebitsError, _Stopped):
            raise
        except Exception as error:  # the library's kinds of error are many
            finding = one_line(" ".join(str(error).split()) or type(error).__name__, 200)
            raise UnsupportedModelError(f"transformers cannot run this model on a text alone ({finding})") from error
        return logits

    @torch.no_grad()
    def _probe(self) -> bool:
        """Try the model on a few tokens: which blocks run, in which order, and whether body and head can be told apart.

        Returns:
            Whether the logits are finite.

        Raises:
            UnsupportedModelError: it does not run.
        """
        rows = min(_PROBE, self._source.specs[self.embedding].shape[0]) if self.embedding else _PROBE
        window = torch.arange(rows)[None]
        captured: list[Any] = []
        self.runs.clear()

        def used(product: Product) -> None:
            self.used[product.region.name] = len(self.runs) - 1

        def capture(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                captured.append(forward(*args, **kwargs))
                return captured[-1]

            return run

        self._entered = 0
        with Products(self.parameter_at, used), _body_replaced(self.model, capture):
            logits = self._called(window)
        if not isinstance(logits, Tensor) or logits.shape[:2] != window.shape:
            raise UnsupportedModelError("it gives no logits for each token of a text")
        self._splits = len(captured) == 1 and first(captured[0]).shape[:2] == window.shape
        if self._splits:
            again = self.tail(captured[0], first(captured[0]), window[0])
            self._splits = again.shape == logits[0].shape and bool(torch.equal(again, logits[0]))
        return bool(logits.isfinite().all())

    def _named_origins(self) -> dict[str, str]:
        """Parameter → tensor of the source: by its own name, or that of a parameter that it is tied to."""
        tied: dict[int, list[str]] = {}
        for name, parameter in self._empty.items():
            tied.setdefault(id(parameter), []).append(name)
        origins = {}
        for name, parameter in self._empty.items():
            found = [of for of in (name, *tied[id(parameter)]) if of in self._source.specs]
            if not found:
                raise CheckpointError(
                    f"tensor {name} is missing: the checkpoint is incomplete, or transformers does not know its names"
                )
            origins[name] = found[0]
        return origins

    def _origin_of(self, module: nn.Module | None) -> str | None:
        """The tensor of the source that is a module's weight."""
        names = (f"{name}.weight" for name, of in self.model.named_modules() if of is module)
        return next((self._origins[name] for name in names if name in self._origins), None)

    def _fill_buffers(self) -> None:
        for path, module in self.model.named_modules():
            for key, buffer in module._buffers.items():
                name = f"{path}.{key}" if path else key
                if buffer is not None and name in self._source.specs and key not in module._non_persistent_buffers_set:
                    tensor = self._source[name]
                    buffer = tensor.float() if tensor.is_floating_point() else tensor
                module._buffers[key] = None if buffer is None else buffer.to(self.device)

    def _enclose(self, name: str, module: nn.Module, *, is_block: bool) -> None:
        """Make a module read its weights when it is entered; of a block nothing else is kept for the backward pass."""
        forward = module.forward

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not is_block:
                with self._weights_of(name, module):
                    return forward(*args, **kwargs)
            number, self._entered = self._entered, self._entered + 1
            if number == len(self.runs):
                self.runs.append(name)
            if torch.is_grad_enabled():
                options: Any = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
                contexts = (self._weights_of(name, module), self._recomputed(name, module))
                result = checkpoint(forward, *args, context_fn=lambda: contexts, **options, **kwargs)
            else:
                with self._weights_of(name, module):
                    result = forward(*args, **kwargs)
            if self._left is not None:
                self._left(number)
            release_freed_memory()
            return result

        module.forward = run

    @contextmanager
    def _recomputed(self, name: str, module: nn.Module) -> Iterator[None]:
        self._recomputes = True
        release_freed_memory()
        self.on_recompute()
        try:
            with self._weights_of(name, module):
                yield
        finally:
            self._recomputes = False

    @contextmanager
    def _weights_of(self, name: str, module: nn.Module) -> Iterator[None]:
        """Have the weights of a module in memory, for as long as this lasts."""
        if self.held_whole or any(not _is_empty(parameter) for parameter in module.parameters()):
            yield
            return
        self._fill(name, module)
        try:
            yield
        finally:
            for path, inner in module.named_modules():
                for key, parameter in inner._parameters.items():
                    if parameter is not None and not _is_empty(parameter):
                        self._loaded.pop(parameter.untyped_storage().data_ptr(), None)
                        inner._parameters[key] = self._empty[_joined(name, path, key)]

    def _fill(self, name: str, module: nn.Module, auxiliary: Sequence[str] = ()) -> None:
        """Read the weights of a module that are not in memory, but for those whose names begin in some way."""
        filled: dict[str, nn.Parameter] = {}
        for path, inner in module.named_modules():
            for key, empty in inner._parameters.items():
                full = _joined(name, path, key)
                if empty is None or not _is_empty(empty) or full.startswith(tuple(auxiliary)):
                    continue
                origin = self._origins[full]
                if origin not in filled:
                    tensor = self._source[origin]
                    wide = tensor.to(self.device, torch.float32).contiguous().reshape(empty.shape)
                    filled[origin] = nn.Parameter(wide, requires_grad=False)
                    self._loaded[wide.untyped_storage().data_ptr()] = origin, wide
                inner._parameters[key] = filled[origin]


def opened_engine(
    source: Source, path: Path, device: torch.device, seen: Callable[[Source], Source] = lambda source: source
) -> tuple[InMemory, Engine]:
    """A model by the names of transformers, and what runs it.

    That is the class that its config names; where it needs more than a text, the language model in it.

    Args:
        source: its tensors.
        path: the folder, for messages.
        device: where to run.
        seen: gives the tensors in another form.

    Raises:
        CheckpointError: see `known_config` and `Engine`.
        UnsupportedModelError: likewise.
    """
    config = known_config(source, path)
    try:
        named = InMemory(seen(source), config)
        return named, Engine(named, config, device)
    except UnsupportedModelError:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.get_text_config() is config:
            raise
    config.architectures = None
    named = InMemory(seen(source), config)
    return named, Engine(named, config, device)


def _ends(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The token embedding and the output head; None where the library does not say which they are."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return None, None


def _placeholder(parameter: Tensor, device: torch.device) -> nn.Parameter:
    """A parameter of NaN without memory, on a device that the library may ask for."""
    return nn.Parameter(torch.full((1,), torch.nan, device=device).expand(parameter.shape), requires_grad=False)


def _is_empty(parameter: Tensor) -> bool:
    """Whether a parameter has no memory of its own."""
    return parameter.is_meta or (parameter.numel() > 1 and not any(parameter.stride()))


def _nothing() -> None:
    """Tell nobody."""


class _Stopped(Exception):  # noqa: N818
    """The body has run; carries what it gave."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _stop_after(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise _Stopped(forward(*args, **kwargs))

    return run


@contextmanager
def _body_replaced(model: Any, replaced: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While this lasts, a model's body, which is all but its head, does something else; a model without one nothing."""
    body = model.base_model
    if body is model:
        yield
        return
    forward = body.forward
    body.forward = replaced(forward)
    try:
        yield
    finally:
        body.forward = forward


def first(output: Any) -> Tensor:
    """The hidden states in what a body gives."""
    first = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    return first if isinstance(first, Tensor) else torch.empty(0)


def _with_first(output: Any, hidden: Tensor) -> Any:
    """The same output with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    changed = copy(output)
    changed["last_hidden_state"] = hidden
    return changed


def _slice(hidden: Tensor, number: int) -> Tensor:
    return hidden[number : number + 1]


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All names of all parameters, also of those that are tied."""
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield _joined(path, key), parameter


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What the library itself checkpoints: the outermost such layers; where there are none, the longest list."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not name.startswith(tuple(f"{of}." for of in found)):
            found[name] = module
    if not found:
        lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
        name = max(lists, key=lambda name: len(lists[name]), default="")
        found = {f"{name}.{number}": module for number, module in enumerate(lists[name])} if name else {}
    yield from found.items()


def _layers_around(model: nn.Module, inside: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Embeddings and linear layers that are in no block."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear) and not name.startswith(tuple(inside)):
            yield name, module


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


class _Spill:
    """Writes large tensors that autograd saves to files, and reads them back."""

    def __init__(self, folder: Path, least: int) -> None:
        self._folder = folder
        self._least = least
        self._count = 0

    def __call__(self, tensor: Tensor) -> Any:
        if 4 * tensor.numel() < self._least or tensor.dtype != torch.float32 or isinstance(tensor, nn.Parameter):
            return tensor
        self._count += 1
        path = self._folder / f"{self._count}"
        tensor.detach().cpu().contiguous().numpy().tofile(path)
        return path, tensor.shape, tensor.device

    @staticmethod
    def read(saved: Any) -> Tensor:
        """What was saved."""
        if isinstance(saved, Tensor):
            return saved
        path, shape, device = saved
        return torch.from_numpy(np.fromfile(path, np.float32)).reshape(shape).to(device)
