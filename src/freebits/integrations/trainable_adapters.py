"""What can be trained of a model that takes no room: the steps of its integers, or its matrices by LoRA."""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from freebits.codecs.arrangement import TRANSPOSED
from freebits.codecs.integers import FINENESS
from freebits.errors import UsageError
from freebits.options import INTEGERS
from freebits.packed.reader import PackedFolder
from freebits.types import TensorSpec

Names = Mapping[str, str]
"""Name of a parameter in memory → in the folder, where both are one tensor."""


class Trainable(Protocol):
    """A model in float32, some of which is trained; the rest is frozen.

    Attributes:
        model: the model.
        what: is trained, in words.
        trained: the parameters that are.
        tensors: what changes by it, by the names in the folder.
        rate: of Adam, at most.
    """

    model: Any
    what: str
    trained: list[nn.Parameter]
    tensors: dict[str, nn.Parameter]
    rate: float

    def finish(self, specs: Mapping[str, TensorSpec]) -> None:
        """Put what was learnt into the tensors, and round them, so that the model computes what will be written."""


class Adapted:
    """Every linear layer but the head gets `B A` added, LoRA by PEFT; merged in the end, it is as large as it was.

    Args:
        model: what is trained; it is changed in place.
        names: of its parameters.
        rank: of the updates.
        seed: of their `A`.
    """

    rate = 1e-3

    def __init__(self, model: Any, names: Names, rank: int, seed: int) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UsageError("recovering such a model takes PEFT: pip install 'freebits[recover]'") from None
        layers = {name: layer for name, layer in linear_layers(model).items() if f"{name}.weight" in names}
        self.what = f"LoRA of rank {rank}"
        self.tensors = {names[f"{name}.weight"]: layer.weight for name, layer in layers.items()}
        self.model = model.requires_grad_(False)
        if layers:
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of matrices that are stored as (inputs, outputs)
                torch.manual_seed(seed)
                inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=[*layers]), model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def finish(self, specs: Mapping[str, TensorSpec]) -> None:
        """Merge the updates."""
        from peft.tuners.lora import LoraLayer

        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.merge()
        _round(self.tensors, specs)


class Rescaled:
    """The steps of the rows of a quantized folder's linear layers, in the grid that they are stored in; norms, biases.

    The integers stay as they are, and so do the steps of matrices rounded in a rotated basis or by another method.

    Args:
        model: what is in the folder; it is changed in place.
        names: of its parameters.
        packed: the folder.
    """

    rate = 1e-3

    def __init__(self, model: Any, names: Names, packed: PackedFolder) -> None:
        self.model = model.requires_grad_(False)
        self.tensors = {
            names[name]: parameter
            for name, parameter in model.named_parameters()
            if parameter.ndim == 1 and parameter.is_floating_point() and name in names
        }
        recipes = packed.manifest.recipes
        made = {name for recipe in recipes if recipe.code == INTEGERS for name in recipe.makes}
        rounded = {
            name: recipe.takes[TRANSPOSED] for recipe in recipes if recipe.code == TRANSPOSED for name in recipe.makes
        }
        self._layers: dict[str, RescaledLinear] = {}
        for path, layer in linear_layers(model).items():
            name = names.get(f"{path}.weight", "")
            name = rounded.get(name, name)
            if name in made:
                self._layers[name] = RescaledLinear(layer)
                model.set_submodule(path, self._layers[name])
        self.what = "steps, norms" if self._layers else "norms"
        self.trained = [*(layer.octaves for layer in self._layers.values()), *self.tensors.values()]
        for parameter in self.trained:
            parameter.requires_grad_(True)

    def finish(self, specs: Mapping[str, TensorSpec]) -> None:
        """Norms and biases; steps are in their grid."""
        _round(self.tensors, specs)

    def steps(self) -> dict[str, Tensor]:
        """By how much the exponents of rows have grown, in their grid, int16: of each matrix as it is rounded."""
        return {name: layer.exponents.detach().to(torch.int16).cpu() for name, layer in self._layers.items()}


class RescaledLinear(nn.Module):
    """A linear layer, its outputs times `2^(e / 16)` for whole `e`, whose rounding gradients do not see."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        n_outputs = layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
        self.octaves = nn.Parameter(torch.zeros(n_outputs, device=layer.weight.device))

    @property
    def exponents(self) -> Tensor:
        """`e`, (n_out,)."""
        exponents = self.octaves * FINENESS
        return exponents + (exponents.round() - exponents).detach()

    def forward(self, x: Tensor) -> Tensor:
        """(…, n_in) to (…, n_out)."""
        weight, bias = self.layer.weight, self.layer.bias
        y = linear(x, weight.T if isinstance(self.layer, Conv1D) else weight) * torch.exp2(self.exponents / FINENESS)
        return y if bias is None else y + bias

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a block asks of its layers, such as their sizes
            return getattr(super().__getattr__("layer"), name)


def linear_layers(model: Any) -> dict[str, Any]:
    """The layers of a model, but for its head, that are nothing but `x Wᵀ + b`; a router may be more."""
    head, found = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            n_out, n_in = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
            with torch.no_grad():
                y = module(torch.zeros(1, n_in, device=module.weight.device, dtype=module.weight.dtype))
            if isinstance(y, Tensor) and y.shape == (1, n_out):
                found[name] = module
    return found


@torch.no_grad()
def _round(tensors: Mapping[str, nn.Parameter], specs: Mapping[str, TensorSpec]) -> None:
    """To the dtypes in which they are stored."""
    for name, tensor in tensors.items():
        tensor.copy_(tensor.to(specs[name].dtype))
