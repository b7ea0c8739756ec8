"""Model classes that are derived from classes in transformers and registered with the Auto classes there."""

import os
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from freebits.models.families import Family
from freebits.storage.auxiliary_files import auto_map, write_remote_code


class OwnModel(PreTrainedModel):
    """Mixin that changes the modules of a model, for model classes of transformers with or without a head."""

    family: Family
    config_class: type[PreTrainedConfig]
    classes: dict[str, str]
    """Name of an Auto class → name of the derived class, for the configuration and the two model classes."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        root: nn.Module = self
        if self.base_model is self:  # then wrap the model, so that module names begin as in a model with a head
            root = nn.Module()
            root.add_module(self.base_model_prefix, self)
        self.change_modules(root, config)
        self.post_init()  # type: ignore[no-untyped-call]

    @staticmethod
    def change_modules(model: nn.Module, config: PreTrainedConfig) -> None:
        """Change the modules of the model in transformers, in place."""
        raise NotImplementedError

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing, so that transformers does not copy this module. `save_pretrained` writes an import instead."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the model as transformers does, and add the code that `trust_remote_code=True` needs."""
        self.config.auto_map = auto_map(self.classes)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(Path(save_directory), type(self).__module__, self.classes)


def derive_classes(
    family: Family, mixin: type[OwnModel], model_type: str, classes: dict[str, str], about: str, **attributes: Any
) -> dict[str, type]:
    """Derive the configuration and model classes of a family, and register them with the Auto classes.

    Args:
        family: the family.
        mixin: the class to mix into the model classes of transformers.
        model_type: the model type of the configuration.
        classes: name of an Auto class → name of the derived class.
        about: text that ends the docstring of each class.
        attributes: further attributes of the model classes.

    Returns:
        Name of a derived class → class.
    """
    causal_lm = getattr(transformers, family.causal_lm)
    module = {"__module__": mixin.__module__}
    config_class = type(
        classes["AutoConfig"],
        (causal_lm.config_class,),
        {
            "model_type": model_type,
            "register_for_auto_class": OwnModel.__dict__["register_for_auto_class"],
            "__doc__": f"Configuration of a {family.model_type} model {about}",
            **module,
        },
    )
    common = {
        "family": family,
        "classes": classes,
        "config_class": config_class,
        **attributes,
        **module,
    }
    AutoConfig.register(model_type, config_class)
    derived, base_model = [config_class], MODEL_MAPPING[causal_lm.config_class]
    originals: list[tuple[Any, Any]] = [(AutoModel, base_model), (AutoModelForCausalLM, causal_lm)]
    for auto_class, original in originals:
        docstring = {"__doc__": f"A {original.__name__} {about}"}
        derived.append(type(classes[auto_class.__name__], (mixin, original), {**common, **docstring}))
        auto_class.register(config_class, derived[-1])
    return {cls.__name__: cls for cls in derived}
