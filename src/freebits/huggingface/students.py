"""What can be trained of a model without a byte more: the steps of its integers, or its matrices by LoRA."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from freebits.codes.integers import FINENESS
from freebits.errors import UnsupportedModelError, UsageError
from freebits.huggingface.shelf import TRANSPOSED
from freebits.options import INTEGERS
from freebits.packed import PackedFolder


class Student(Protocol):
    """A model in float32, some of which is trained; the rest is frozen."""

    model: Any
    trained: list[nn.Parameter]
    rate: float
    """Of Adam, at most."""

    def tensors(self) -> dict[str, Tensor]:
        """What has been trained, by the names in the folder, in float32."""


class Adapted:
    """Every linear layer but the head gets `(alpha / rank) B A` added, LoRA by PEFT; merged, it is as it was.

    Args:
        model: what is trained; it is changed in place.
        rank: of the update.
        seed: of its `A`.
    """

    rate = 1e-3

    def __init__(self, model: Any, rank: int, seed: int) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UsageError("recovering such a model takes PEFT: pip install 'freebits[recover]'") from None
        head = model.get_output_embeddings()
        names = [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
        if not names:
            raise UnsupportedModelError(f"{type(model).__name__} has no linear layers that LoRA knows")
        model.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def tensors(self) -> dict[str, Tensor]:
        """The matrices, with their updates."""
        from peft.tuners.lora import LoraLayer

        merged = {}
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                layer: Any = module
                update = layer.get_delta_weight("default")
                merged[f"{name}.weight"] = (layer.get_base_layer().weight + update).detach()
        return merged


class Rescaled:
    """The step of every row of a quantised folder's matrices, in the grid that they are stored in; norms and biases.

    Its integers stay as they are, and so do the steps of matrices rounded in a rotated basis or by another method.

    Args:
        model: what is in the folder; it is changed in place.
        packed: the folder.
    """

    rate = 1e-3

    def __init__(self, model: Any, packed: PackedFolder) -> None:
        self.model = model
        self._layers: dict[str, RescaledLinear] = {}
        model.requires_grad_(False)
        self._vectors = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.ndim == 1 and parameter.is_floating_point() and name in packed.kinds
        }
        made = {name for recipe in packed.manifest.recipes if recipe.code == INTEGERS for name in recipe.makes}
        turned = {
            recipe.takes[TRANSPOSED]: name
            for recipe in packed.manifest.recipes
            if recipe.code == TRANSPOSED
            for name in recipe.makes
        }
        modules, head = dict(model.named_modules()), model.get_output_embeddings()
        for name in sorted(made):
            path = turned.get(name, name).removesuffix(".weight")
            module = modules.get(path)
            if module is not None and module is not head and not isinstance(module, nn.Embedding):
                self._layers[name] = RescaledLinear(module, transposed=name in turned)
                model.set_submodule(path, self._layers[name])
        self.trained = [*(layer.octaves for layer in self._layers.values()), *self._vectors.values()]
        for parameter in self.trained:
            parameter.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        """Norms and biases."""
        return {name: parameter.detach() for name, parameter in self._vectors.items()}

    def steps(self) -> Mapping[str, Tensor]:
        """By how much the exponents of rows have grown, in their grid, int16: of each matrix as it is rounded."""
        return {name: layer.exponents.detach().to(torch.int16).cpu() for name, layer in self._layers.items()}


class RescaledLinear(nn.Module):
    """A linear layer, its outputs times `2^(e / 16)` for whole `e`, whose rounding gradients do not see.

    Args:
        layer: what is rescaled.
        transposed: whether its matrix is (inputs, outputs).
    """

    def __init__(self, layer: Any, *, transposed: bool) -> None:
        super().__init__()
        self.layer = layer
        self.transposed = transposed
        n_outputs = layer.weight.shape[1 if transposed else 0]
        self.octaves = nn.Parameter(torch.zeros(n_outputs, device=layer.weight.device))

    @property
    def exponents(self) -> Tensor:
        """`e`, (n_out,)."""
        exponents = self.octaves * FINENESS
        return exponents + (exponents.round() - exponents).detach()

    def forward(self, x: Tensor) -> Tensor:
        """(…, n_in) to (…, n_out)."""
        weight, bias = self.layer.weight, self.layer.bias
        y = linear(x, weight.T if self.transposed else weight) * torch.exp2(self.exponents / FINENESS)
        return y if bias is None else y + bias

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a block asks of its layers, such as their sizes
            return getattr(super().__getattr__("layer"), name)
