"""Models some of whose linear layers are two thin ones, as reduced-order modelling makes them, in transformers.

For each family a configuration and a model class are derived from the library's: `low_ranks` names the layers, with
their ranks. A sliced model with the same key has such layers, too.
"""

import os
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from freebits.architecture import LOW_RANKS, MODEL_TYPES, Family
from freebits.checkpoint import auto_map, write_remote_code


class LowRankLinear(nn.Module):
    """`x ↦ (x Dᵀ) Uᵀ + b`: `down.weight` is `D: (rank, inputs)`, `up.weight` is `U: (outputs, rank)`."""

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.down: Any = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Through the narrow space."""
        result: Tensor = self.up(self.down(x))
        return result


class LowRankCausalLM(PreTrainedModel):
    """What a model with such layers adds to the library's class."""

    family: Family
    config_class: type[PreTrainedConfig]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        split_layers(self, config)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: when the model is saved, our two lines of code go with it, not a copy of this module."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, and with the code that `trust_remote_code=True` asks for."""
        self.config.auto_map = auto_map(self.family.low_rank_classes)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(Path(save_directory), __name__, self.family.low_rank_classes)


def split_layers(model: nn.Module, config: PreTrainedConfig) -> None:
    """Put two thin layers in the place of each that the config names."""
    for name, rank in (getattr(config, LOW_RANKS, None) or {}).items():
        layer: Any = model.get_submodule(name)
        outputs, inputs = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
        thin = LowRankLinear(inputs, outputs, rank, bias=layer.bias is not None)
        model.set_submodule(name, thin.to(layer.weight.device, layer.weight.dtype))


def _register(family: Family) -> tuple[type[PreTrainedConfig], type[LowRankCausalLM]]:
    """Derive a family's classes from the library's and make the Auto classes know them."""
    dense = getattr(transformers, family.causal_lm)
    names = family.low_rank_classes
    config_class = type(
        names["AutoConfig"],
        (dense.config_class,),
        {
            "model_type": family.low_rank_model_type,
            "register_for_auto_class": LowRankCausalLM.__dict__["register_for_auto_class"],
            "__module__": __name__,
            "__doc__": f"Configuration of a {family.model_type} model with layers of low rank: `{LOW_RANKS}` has them.",
        },
    )
    model_class = type(
        names["AutoModelForCausalLM"],
        (LowRankCausalLM, dense),
        {"family": family, "config_class": config_class, "__module__": __name__, "__doc__": f"A {dense.__name__}."},
    )
    AutoConfig.register(family.low_rank_model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return config_class, model_class


_CLASSES = {kind.__name__: kind for family in MODEL_TYPES.values() for kind in _register(family)}


def __getattr__(name: str) -> Any:
    """The derived classes, by name: `LowRankLlamaConfig`, `LowRankLlamaForCausalLM` and so on."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _CLASSES[name]
