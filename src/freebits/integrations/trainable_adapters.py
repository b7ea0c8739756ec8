"""Train a model without making it larger: a quantized model by its scales, norms and biases, any other by LoRA."""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from freebits.codecs.integers import FINENESS
from freebits.codecs.rearranging import TRANSPOSED
from freebits.errors import UsageError
from freebits.options import INTEGERS
from freebits.packed.reader import PackedFolder
from freebits.types import TensorSpec

ParameterNames = Mapping[str, str]
"""Name of a parameter in memory → name of its tensor in the folder. Merged or split parameters are left out."""


class Trainable(Protocol):
    """A model in float32 with some trainable parameters; the others are frozen.

    Attributes:
        model: the model.
        description: trained parameters, as the history records them.
        trained: the trainable parameters.
        tensors: name in the folder → tensor that training changes, except matrices whose scales are trained.
        rate: maximum learning rate of Adam.
    """

    model: Any
    description: str
    trained: list[nn.Parameter]
    tensors: dict[str, nn.Parameter]
    rate: float

    def finish(self, specs: Mapping[str, TensorSpec]) -> None:
        """Merge the result of training into the tensors, and round the tensors to the dtypes in `specs`."""


class LoraAdapters:
    """Adds a trainable product `B A` of two small matrices to each linear layer, except the head (LoRA, by PEFT).

    At the end, `B A` is merged into the weights, so that the model keeps its size.

    Args:
        model: the model to train; it is changed in place.
        names: names of the model's parameters.
        rank: rank of `B A`.
        seed: seed for the random initial values of `A`.
    """

    rate = 1e-3

    def __init__(self, model: Any, names: ParameterNames, rank: int, seed: int) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UsageError(
                "training a model that is not quantized needs PEFT: run pip install 'freebits[recover]'"
            ) from None
        layers = {name: layer for name, layer in linear_layers(model).items() if f"{name}.weight" in names}
        self.description = f"LoRA of rank {rank}"
        self.tensors = {names[f"{name}.weight"]: layer.weight for name, layer in layers.items()}
        self.model = model.requires_grad_(False)
        if layers:
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns about matrices that are stored as (inputs, outputs)
                torch.manual_seed(seed)
                inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=[*layers]), model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def finish(self, specs: Mapping[str, TensorSpec]) -> None:
        """Merge each `B A` into the weights, and round the weights."""
        from peft.tuners.lora import LoraLayer

        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.merge()
        _round(self.tensors, specs)


class ScaleAdapters:
    """Trains norms, biases, and the row scales of quantized linear layers.

    The scales only take values that the folder can store. The integers do not change. The scales of a matrix do not
    change either if it was rounded in a rotated basis, in several blocks of rows, or by another method.

    Args:
        model: the model in the folder; it is changed in place.
        names: names of the model's parameters.
        packed: the packed folder of the model.
    """

    rate = 1e-3

    def __init__(self, model: Any, names: ParameterNames, packed: PackedFolder) -> None:
        self.model = model.requires_grad_(False)
        self.tensors = {
            names[name]: parameter
            for name, parameter in model.named_parameters()
            if parameter.ndim == 1 and parameter.is_floating_point() and name in names
        }
        recipes = packed.manifest.recipes
        quantized = {name for recipe in recipes if recipe.code == INTEGERS for name in recipe.makes}
        transposed = {
            name: recipe.takes[TRANSPOSED] for recipe in recipes if recipe.code == TRANSPOSED for name in recipe.makes
        }
        self._layers: dict[str, RescaledLinear] = {}
        for path, layer in linear_layers(model).items():
            name = names.get(f"{path}.weight", "")
            name = transposed.get(name, name)
            if name in quantized:
                self._layers[name] = RescaledLinear(layer)
                model.set_submodule(path, self._layers[name])
        self.description = "scales, norms, biases" if self._layers else "norms, biases"
        self.trained = [*(layer.octaves for layer in self._layers.values()), *self.tensors.values()]
        for parameter in self.trained:
            parameter.requires_grad_(True)

    def finish(self, specs: Mapping[str, TensorSpec]) -> None:
        """Round norms and biases. The scales already have values that the folder can store."""
        _round(self.tensors, specs)

    def exponent_changes(self) -> dict[str, Tensor]:
        """Return name of a matrix → the changes of the exponents of its row scales by training, (n_out,), int16."""
        return {name: layer.exponents.detach().to(torch.int16).cpu() for name, layer in self._layers.items()}


class RescaledLinear(nn.Module):
    """A linear layer that multiplies each row of its weight by `2^(e / 16)`.

    The exponent `e` of a row is `16 * octaves`, rounded to an integer. `octaves` is trained. Gradients ignore the
    rounding.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        n_outputs = layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
        self.octaves = nn.Parameter(torch.zeros(n_outputs, device=layer.weight.device))

    @property
    def exponents(self) -> Tensor:
        """The exponents `e`, rounded to integers, (n_out,)."""
        exponents = self.octaves * FINENESS
        return exponents + (exponents.round() - exponents).detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (…, n_in) to outputs (…, n_out)."""
        weight, bias = self.layer.weight, self.layer.bias
        y = linear(x, weight.T if isinstance(self.layer, Conv1D) else weight) * torch.exp2(self.exponents / FINENESS)
        return y if bias is None else y + bias

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # blocks read attributes of their layers, such as sizes
            return getattr(super().__getattr__("layer"), name)


def linear_layers(model: Any) -> dict[str, Any]:
    """Return name → layer of each layer that only computes `x Wᵀ + b`, except the head.

    A router that computes more than `x Wᵀ + b` is left out.
    """
    head, layers = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            n_out, n_in = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
            with torch.no_grad():
                y = module(torch.zeros(1, n_in, device=module.weight.device, dtype=module.weight.dtype))
            if isinstance(y, Tensor) and y.shape == (1, n_out):
                layers[name] = module
    return layers


@torch.no_grad()
def _round(tensors: Mapping[str, nn.Parameter], specs: Mapping[str, TensorSpec]) -> None:
    """Round tensors in place to the dtypes in `specs`."""
    for name, tensor in tensors.items():
        tensor.copy_(tensor.to(specs[name].dtype))
