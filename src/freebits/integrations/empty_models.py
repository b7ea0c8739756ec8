"""Create models of transformers without weights."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from freebits.integrations.packed_models import class_for_text

MODEL_CREATION_LOCK = threading.Lock()
"""Lock to hold while a model is created: creation changes PyTorch's default dtype and `nn.Module` for all threads."""


def empty_model(config: PreTrainedConfig) -> Any:
    """Create the language model of a config, in float32. The parameters take no memory, but the buffers have values.

    Raises:
        UnsupportedModelError: see `class_for_text`.
    """
    model_class = class_for_text(config)
    if model_class.config_class is config.sub_configs.get("text_config"):  # the text part of a multimodal model
        config = config.get_text_config()
    with MODEL_CREATION_LOCK, _parameters_on_meta():
        config._experts_implementation = "eager"  # runs the experts one by one, so that each can be observed
        model = model_class(config).eval()
        return model._apply(
            lambda tensor: tensor.float() if tensor.is_floating_point() else tensor
        )  # not `to`, which would also convert complex buffers


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter of a new module to the meta device as soon as the module has created the parameter.

    Then the parameter takes no memory. Buffers stay where they are created.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied parameter is already on the meta device
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
