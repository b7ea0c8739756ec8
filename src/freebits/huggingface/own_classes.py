"""What our models add to the library's classes, whatever they are: how they are derived, registered and saved."""

import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from freebits.architecture import Family
from freebits.checkpoint import auto_map, write_remote_code


class OwnCausalLM(PreTrainedModel):
    """A model class of ours, to be mixed with one of the library's."""

    family: Family
    config_class: type[PreTrainedConfig]
    classes: dict[str, str]
    """Names of its configuration and of itself, by the Auto classes that find them."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: when the model is saved, our two lines of code go with it, not a copy of its module."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, and with the code that `trust_remote_code=True` asks for."""
        self.config.auto_map = auto_map(self.classes)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(Path(save_directory), type(self).__module__, self.classes)


def derive(
    family: Family, mixin: type[OwnCausalLM], model_type: str, classes: dict[str, str], about: str, **more: Any
) -> dict[str, type]:
    """Derive a family's classes from the library's and make the Auto classes know them.

    Args:
        family: whose.
        mixin: what is added to the library's model.
        model_type: of the configuration.
        classes: their names, by the Auto classes that find them.
        about: what the configuration is of.
        more: attributes of the model class.

    Returns:
        Both classes by their names.
    """
    dense = getattr(transformers, family.causal_lm)
    here = {"__module__": mixin.__module__}
    config_class = type(
        classes["AutoConfig"],
        (dense.config_class,),
        {
            "model_type": model_type,
            "register_for_auto_class": OwnCausalLM.__dict__["register_for_auto_class"],
            "__doc__": f"Configuration of a {family.model_type} model {about}",
            **here,
        },
    )
    told = {
        "family": family,
        "classes": classes,
        "config_class": config_class,
        "__doc__": f"A {dense.__name__} {about}",
    }
    model_class = type(classes["AutoModelForCausalLM"], (mixin, dense), {**told, **more, **here})
    AutoConfig.register(model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return {kind.__name__: kind for kind in (config_class, model_class)}
