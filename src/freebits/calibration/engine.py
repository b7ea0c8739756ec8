"""Run the forward and the backward pass of a causal language model of transformers, with few weights in memory.

All weights of a small model stay in memory (see `MAX_RESIDENT_BYTES`). With a larger model, a pass loads the weights of
a block when it enters the block, and drops them when it leaves the block. The backward pass loads the weights again,
because it recomputes each block (gradient checkpointing). Loading replaces the `Parameter` object, so tensors that
autograd saved stay valid. The embedding and the head are loaded and dropped in the same way.

For a batch of `t` tokens, a stream of width `d` and blocks of inner width `d_ff`, the passes need about
`4 t (3 d_ff + 8 d)` bytes plus 3 blocks in float32. The inputs of the blocks, which the backward pass needs, go to disk
if they are large; see `Engine.stream_on_disk`.
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

from freebits.calibration.observers import Product, Products
from freebits.errors import CheckpointError, FreebitsError, UnsupportedModelError, is_out_of_memory, reason_of
from freebits.execution.machine import release_freed_memory
from freebits.integrations.empty_models import empty_model
from freebits.integrations.naming import TransformersView, config_object
from freebits.storage.checkpoint import Source

MAX_RESIDENT_BYTES = 2**30
"""If a model takes at most this many bytes in float32, all its weights stay in memory."""
_N_PROBE_TOKENS = 12
OnBlockEnd = Callable[[int], None]
"""Called when a block has run, with the index of this block execution. Indices start at 0 in each pass."""


class Engine:
    """A causal language model that transformers runs in float32, without gradients of the weights.

    Attributes:
        model: transformers model; weights that are not loaded take no memory.
        device: device on which the model runs.
        blocks: names of the blocks.
        runs: names of the blocks in order of execution; a block in a loop occurs several times.
        last_uses: name of a parameter in `source` → index of the block execution in which, or after which, the model
            last multiplies by this parameter.
        on_recompute: callback that is called when the backward pass enters a block.
        embedding: name of the token embedding in `source`; None if transformers finds no embedding.
        head: name of the output head in `source`, or of the embedding if the two are tied; None if transformers finds
            no head.

    Args:
        source: tensors of the model, under transformers' names.
        config: config of the model, parsed by transformers.
        device: device on which to run the model.
        modify_model: function that modifies the transformers model before its weights are loaded.
        max_resident_bytes: all weights stay in memory if they take at most this many bytes in float32.
        max_stream_bytes: the inputs of the blocks go to disk if they take more than this many bytes together.

    Raises:
        CheckpointError: a tensor is missing.
        UnsupportedModelError: transformers cannot run the model on text only, or the model does not return logits for
            each token.
    """

    def __init__(
        self,
        source: Source,
        config: PreTrainedConfig,
        device: torch.device,
        modify_model: Callable[[Any], None] = lambda _: None,
        *,
        max_resident_bytes: int = MAX_RESIDENT_BYTES,
        max_stream_bytes: int = 2**30,
    ) -> None:
        self.model = empty_model(config)
        modify_model(self.model)
        self.device = device
        self.last_uses: dict[str, int] = {}
        self.runs: list[str] = []
        self._source = source
        self._max_stream_bytes = max_stream_bytes
        self.on_recompute: Callable[[], None] = lambda: None
        self._on_block_end: OnBlockEnd | None = None
        self._n_entered = 0
        self._is_recomputing = False
        self._loaded: dict[int, tuple[str, Tensor]] = {}
        self._has_separate_head = True
        self._empty = dict(_all_parameters(self.model))
        self._origins = self._named_origins()
        embedding, self._head = _embedding_and_head(self.model)
        self.embedding = self._origin_of(embedding)
        self.head = self._origin_of(self._head)
        self._load_buffers()
        blocks = dict(_blocks(self.model))
        self.blocks = tuple(blocks)
        distinct = {self._origins[name]: tensor.numel() for name, tensor in self._empty.items()}
        self._is_resident = 4 * sum(distinct.values()) <= max_resident_bytes
        block_prefixes = tuple(f"{name}." for name in blocks)
        outer_layers = {} if self._is_resident else dict(_outer_layers(self.model, block_prefixes))
        for name, module in outer_layers.items():
            self._empty[f"{name}.weight"] = module._parameters["weight"] = _placeholder(
                self._empty[f"{name}.weight"], device
            )
        for name, module in {**blocks, **outer_layers}.items():
            self._load_on_entry(name, module, is_block=name in blocks)
        loaded_on_entry = () if self._is_resident else (*block_prefixes, *(f"{name}." for name in outer_layers))
        self._load("", self.model, excluded=loaded_on_entry)
        if not self._probe() and outer_layers:  # perhaps the model uses a layer's NaN weight without calling the layer
            self._load("", self.model, excluded=block_prefixes)
            self._probe()

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Name in the source → shape, for all parameters with at least two dimensions."""
        return {self._origins[name]: tuple(tensor.shape) for name, tensor in self._empty.items() if tensor.ndim > 1}

    def find_parameter(self, tensor: Any) -> tuple[str, Tensor] | None:
        """Return the name (in the source) and the value of the parameter in whose memory a tensor lies.

        Return None if there is no such parameter, or while a block is recomputed.
        """
        if self._is_recomputing or not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return None
        return self._loaded.get(tensor.untyped_storage().data_ptr())

    @torch.no_grad()
    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """For each window of a batch, yield the logits for the tokens after the first token, (T - 1, V).

        Args:
            windows: (windows, T), int64.
        """
        output = self.hidden(windows)
        with self.head_loaded():
            for number, window in enumerate(windows):
                yield self.run_head(output, hidden_states(output)[number : number + 1], window)[:-1]

    def hidden(self, windows: Tensor, on_block_end: OnBlockEnd | None = None) -> Any:
        """Run the body of the model (everything except the head), and return the output of the body.

        If the head cannot run separately, run the whole model and return a tuple that contains only the logits.

        Args:
            windows: (windows, T), int64.
            on_block_end: callback, see `OnBlockEnd`.

        Raises:
            UnsupportedModelError: transformers cannot run the model on text only.
        """
        self._on_block_end, self._n_entered = on_block_end, 0
        try:
            if not self._has_separate_head:
                return (self._called(windows),)
            with _body_replaced(self.model, _stop_after):
                try:
                    self._called(windows)
                except _Stopped as stopped:
                    return stopped.output
            raise UnsupportedModelError("the `forward` function of this model does not call the body of the model")
        finally:
            self._on_block_end = None

    def run_head(self, output: Any, hidden: Tensor, window: Tensor) -> Tensor:
        """Return the logits of one window, (T, V), given the last hidden states of the window, (1, T, D).

        Args:
            output: output of `hidden` for the batch.
            hidden: hidden states of the window; if the head cannot run separately, the logits of the window, (1, T, V).
            window: (T,), int64.
        """
        if not self._has_separate_head:
            return hidden[0]
        with _body_replaced(self.model, lambda _: lambda *_, **__: _with_hidden_states(output, hidden)):
            logits: Tensor = self._called(window[None])[0]
        return logits

    @contextmanager
    def head_loaded(self) -> Iterator[None]:
        """Inside the `with` block, keep the weights of the head in memory."""
        name = next((n for n, module in self.model.named_modules() if module is self._head), None)
        if self._head is None or name is None or self._is_resident:
            yield
            return
        with self._weights_of(name, self._head):
            yield

    @contextmanager
    def stream_on_disk(self, windows: Tensor, folder: Path) -> Iterator[None]:
        """Inside the `with` block, let autograd keep the inputs of the model's blocks in files instead of in memory.

        If the inputs of all blocks take at most `max_stream_bytes` bytes, keep them in memory.

        Args:
            windows: (windows, T), the batch that will be run.
            folder: folder in which to create a temporary folder.
        """
        width = getattr(self.model.config.get_text_config(), "hidden_size", 0)
        size = 4 * windows.numel() * width
        if size * len(self.runs) <= self._max_stream_bytes:
            yield
            return
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            hooks = saved_tensors_hooks(_DiskTensors(Path(scratch), size), _DiskTensors.read)
            with hooks:
                yield

    def _called(self, windows: Tensor) -> Tensor:
        try:
            logits: Tensor = self.model(input_ids=windows.to(self.device), use_cache=False).logits
        except (FreebitsError, _Stopped):
            raise
        except Exception as error:  # transformers raises exceptions of many classes
            if is_out_of_memory(error):
                raise
            reason = reason_of(error)
            raise UnsupportedModelError(f"transformers cannot run this model on text only ({reason})") from error
        return logits

    @torch.no_grad()
    def _probe(self) -> bool:
        """Run the model on a few tokens to find the order of its blocks, and whether its head can run separately.

        Returns:
            Whether the logits are finite.

        Raises:
            UnsupportedModelError: the model does not run, or does not return logits for each token.
        """
        n_tokens = _N_PROBE_TOKENS
        if self.embedding:
            n_tokens = min(n_tokens, self._source.specs[self.embedding].shape[0])
        window = torch.arange(n_tokens)[None]
        outputs: list[Any] = []
        self.runs.clear()

        def note_use(product: Product) -> None:
            self.last_uses[product.region.name] = len(self.runs) - 1

        def capture(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                outputs.append(forward(*args, **kwargs))
                return outputs[-1]

            return run

        self._n_entered = 0
        with Products(self.find_parameter, note_use), _body_replaced(self.model, capture):
            logits = self._called(window)
        if not isinstance(logits, Tensor) or logits.shape[:2] != window.shape:
            raise UnsupportedModelError("the model does not return logits for each token of a text")
        self._has_separate_head = len(outputs) == 1 and hidden_states(outputs[0]).shape[:2] == window.shape
        if self._has_separate_head:
            from_head = self.run_head(outputs[0], hidden_states(outputs[0]), window[0])
            self._has_separate_head = from_head.shape == logits[0].shape and bool(torch.equal(from_head, logits[0]))
        return bool(logits.isfinite().all())

    def _named_origins(self) -> dict[str, str]:
        """Return parameter → name in the source, which is the name of the parameter or of a parameter tied to it."""
        tied: dict[int, list[str]] = {}
        for name, parameter in self._empty.items():
            tied.setdefault(id(parameter), []).append(name)
        origins = {}
        for name, parameter in self._empty.items():
            candidates = [alias for alias in (name, *tied[id(parameter)]) if alias in self._source.specs]
            if not candidates:
                raise CheckpointError(
                    f"the checkpoint has no tensor that transformers would load as {name}: download it again"
                )
            origins[name] = candidates[0]
        return origins

    def _origin_of(self, module: nn.Module | None) -> str | None:
        """Return the name in the source of a module's weight; None if the source has no such tensor."""
        names = (f"{name}.weight" for name, other in self.model.named_modules() if other is module)
        return next((self._origins[name] for name in names if name in self._origins), None)

    def _load_buffers(self) -> None:
        for path, module in self.model.named_modules():
            for key, buffer in module._buffers.items():
                name = f"{path}.{key}" if path else key
                if buffer is not None and name in self._source.specs and key not in module._non_persistent_buffers_set:
                    tensor = self._source[name]
                    buffer = tensor.float() if tensor.is_floating_point() else tensor
                module._buffers[key] = None if buffer is None else buffer.to(self.device)

    def _load_on_entry(self, name: str, module: nn.Module, *, is_block: bool) -> None:
        """Make a module load its weights when it is entered, and drop them when it is left.

        A block also uses gradient checkpointing, so autograd saves only the inputs of the block.
        """
        forward = module.forward

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not is_block:
                with self._weights_of(name, module):
                    return forward(*args, **kwargs)
            number, self._n_entered = self._n_entered, self._n_entered + 1
            if number == len(self.runs):
                self.runs.append(name)
            if torch.is_grad_enabled():
                options: Any = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
                contexts = (self._weights_of(name, module), self._recomputing(name, module))
                result = checkpoint(forward, *args, context_fn=lambda: contexts, **options, **kwargs)
            else:
                with self._weights_of(name, module):
                    result = forward(*args, **kwargs)
            if self._on_block_end is not None:
                self._on_block_end(number)
            release_freed_memory()
            return result

        module.forward = run

    @contextmanager
    def _recomputing(self, name: str, module: nn.Module) -> Iterator[None]:
        self._is_recomputing = True
        release_freed_memory()
        self.on_recompute()
        try:
            with self._weights_of(name, module):
                yield
        finally:
            self._is_recomputing = False

    @contextmanager
    def _weights_of(self, name: str, module: nn.Module) -> Iterator[None]:
        """Inside the `with` block, keep the weights of a module in memory."""
        if self._is_resident or any(not _is_empty(parameter) for parameter in module.parameters()):
            yield
            return
        self._load(name, module)
        try:
            yield
        finally:
            for path, inner in module.named_modules():
                for key, parameter in inner._parameters.items():
                    if parameter is not None and not _is_empty(parameter):
                        self._loaded.pop(parameter.untyped_storage().data_ptr(), None)
                        inner._parameters[key] = self._empty[_joined(name, path, key)]

    def _load(self, name: str, module: nn.Module, excluded: Sequence[str] = ()) -> None:
        """Load the missing weights of a module, except those whose names start with a prefix in `excluded`."""
        loaded: dict[str, nn.Parameter] = {}
        for path, inner in module.named_modules():
            for key, empty in inner._parameters.items():
                full_name = _joined(name, path, key)
                if empty is None or not _is_empty(empty) or full_name.startswith(tuple(excluded)):
                    continue
                origin = self._origins[full_name]
                if origin not in loaded:
                    tensor = self._source[origin]
                    wide = tensor.to(self.device, torch.float32).contiguous().reshape(empty.shape)
                    loaded[origin] = nn.Parameter(wide, requires_grad=False)
                    self._loaded[wide.untyped_storage().data_ptr()] = origin, wide
                inner._parameters[key] = loaded[origin]


def open_engine(
    source: Source, path: Path, device: torch.device, convert: Callable[[Source], Source] = lambda source: source
) -> tuple[TransformersView, Engine]:
    """Return a model's tensors under transformers' names, and an engine that runs the model.

    The engine runs the class that the config names. If that class needs other inputs than text, the engine runs the
    language model inside that class.

    Args:
        source: tensors of the model.
        path: folder of the model, for error messages.
        device: device on which to run the model.
        convert: function that returns a source with the same tensors in another form.

    Raises:
        CheckpointError: see `config_object` and `Engine`.
        UnsupportedModelError: see `config_object` and `Engine`.
    """
    config = config_object(source, path)
    try:
        named = TransformersView(convert(source), config)
        return named, Engine(named, config, device)
    except UnsupportedModelError:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.get_text_config() is config:
            raise
    config.architectures = None
    named = TransformersView(convert(source), config)
    return named, Engine(named, config, device)


def _embedding_and_head(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the token embedding and the output head of a model. A layer that transformers does not find is None."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return None, None


def _placeholder(parameter: Tensor, device: torch.device) -> nn.Parameter:
    """Return a parameter of NaN values, of the same shape, on a device. It takes only the memory of one value."""
    return nn.Parameter(torch.full((1,), torch.nan, device=device).expand(parameter.shape), requires_grad=False)


def _is_empty(parameter: Tensor) -> bool:
    """Return whether a parameter is on the meta device or is a placeholder."""
    return parameter.is_meta or (parameter.numel() > 1 and not any(parameter.stride()))


class _Stopped(Exception):  # noqa: N818
    """Exception that stops the model after its body and carries the output of the body."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _stop_after(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise _Stopped(forward(*args, **kwargs))

    return run


@contextmanager
def _body_replaced(model: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside the `with` block, wrap the forward function of a model's body, if the model has a body."""
    body = model.base_model
    if body is model:
        yield
        return
    forward = body.forward
    body.forward = wrap(forward)
    try:
        yield
    finally:
        body.forward = forward


def hidden_states(output: Any) -> Tensor:
    """Return the hidden states in a body's output, or an empty tensor if the output has none."""
    states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    return states if isinstance(states, Tensor) else torch.empty(0)


def _with_hidden_states(output: Any, hidden: Tensor) -> Any:
    """Return a copy of a body's output with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    changed = copy(output)
    changed["last_hidden_state"] = hidden
    return changed


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name and value of each parameter. Yield a tied parameter under each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield _joined(path, key), parameter


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost layers that support gradient checkpointing.

    If there are none, yield the items of the longest module list.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside_block = name.startswith(tuple(f"{block}." for block in blocks))
        if isinstance(module, GradientCheckpointingLayer) and not is_inside_block:
            blocks[name] = module
    if not blocks:
        lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
        name = max(lists, key=lambda name: len(lists[name]), default="")
        blocks = {f"{name}.{number}": module for number, module in enumerate(lists[name])} if name else {}
    yield from blocks.items()


def _outer_layers(model: nn.Module, block_prefixes: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the embeddings and linear layers outside blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear) and not name.startswith(tuple(block_prefixes)):
            yield name, module


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


class _DiskTensors:
    """Hooks that write large tensors of autograd to files, and read the tensors back."""

    def __init__(self, folder: Path, min_bytes: int) -> None:
        self._folder = folder
        self._min_bytes = min_bytes
        self._count = 0

    def __call__(self, tensor: Tensor) -> Any:
        is_small = 4 * tensor.numel() < self._min_bytes
        if is_small or tensor.dtype != torch.float32 or isinstance(tensor, nn.Parameter):
            return tensor
        self._count += 1
        path = self._folder / f"{self._count}"
        tensor.detach().cpu().contiguous().numpy().tofile(path)
        return path, tensor.shape, tensor.device

    @staticmethod
    def read(saved: Any) -> Tensor:
        """Return a saved tensor. If the tensor was written to a file, read the file."""
        if isinstance(saved, Tensor):
            return saved
        path, shape, device = saved
        return torch.from_numpy(np.fromfile(path, np.float32)).reshape(shape).to(device)
