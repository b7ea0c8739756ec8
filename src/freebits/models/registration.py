"""What our models add to the library's classes, whatever they are: how they are derived, registered and saved."""

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
    """What is ours in a model class, to be mixed with one of the library's, with a head or without."""

    family: Family
    config_class: type[PreTrainedConfig]
    classes: dict[str, str]
    """Names of its configuration and of both classes, by the Auto classes that find them."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        whole: nn.Module = self
        if self.base_model is self:  # by names that begin as in a model with a head
            whole = nn.Module()
            whole.add_module(self.base_model_prefix, self)
        self.make_ours(whole, config)
        self.post_init()  # type: ignore[no-untyped-call]

    @staticmethod
    def make_ours(model: nn.Module, config: PreTrainedConfig) -> None:
        """Change the library's modules."""
        raise NotImplementedError

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: when the model is saved, our two lines of code go with it, not a copy of its module."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, and with the code that `trust_remote_code=True` asks for."""
        self.config.auto_map = auto_map(self.classes)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(Path(save_directory), type(self).__module__, self.classes)


def derive(
    family: Family, mixin: type[OwnModel], model_type: str, classes: dict[str, str], about: str, **more: Any
) -> dict[str, type]:
    """Derive a family's classes from the library's and make the Auto classes know them.

    Args:
        family: whose.
        mixin: what is added to the library's model.
        model_type: of the configuration.
        classes: their names, by the Auto classes that find them.
        about: what the configuration is of.
        more: attributes of the model classes.

    Returns:
        The classes by their names.
    """
    dense = getattr(transformers, family.causal_lm)
    here = {"__module__": mixin.__module__}
    config_class = type(
        classes["AutoConfig"],
        (dense.config_class,),
        {
            "model_type": model_type,
            "register_for_auto_class": OwnModel.__dict__["register_for_auto_class"],
            "__doc__": f"Configuration of a {family.model_type} model {about}",
            **here,
        },
    )
    told = {
        "family": family,
        "classes": classes,
        "config_class": config_class,
        **more,
        **here,
    }
    AutoConfig.register(model_type, config_class)
    made, without_head = [config_class], MODEL_MAPPING[dense.config_class]
    bases: list[tuple[Any, Any]] = [(AutoModel, without_head), (AutoModelForCausalLM, dense)]
    for auto, theirs in bases:
        about_it = {"__doc__": f"A {theirs.__name__} {about}"}
        made.append(type(classes[auto.__name__], (mixin, theirs), {**told, **about_it}))
        auto.register(config_class, made[-1])
    return {spec.__name__: spec for spec in made}
