"""The library's models without weights."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from freebits.integrations.packed_models import class_for_text

BUILDING = threading.Lock()
"""Building a model changes what holds for all threads: transformers sets PyTorch's dtype, we make parameters empty."""


def empty_model(config: PreTrainedConfig) -> Any:
    """The language model of a config, to run in float32. Its parameters have no memory; its buffers are real.

    Raises:
        UnsupportedModelError: see `class_for_text`.
    """
    spec = class_for_text(config)
    if spec.config_class is config.sub_configs.get("text_config"):  # of a model that sees, too
        config = config.get_text_config()
    with BUILDING, _parameters_on_meta():
        config._experts_implementation = "eager"  # one after another, so that each can be observed
        model = spec(config).eval()
        return model._apply(
            lambda tensor: tensor.float() if tensor.is_floating_point() else tensor
        )  # `to` spoils complex


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made here have parameters without memory, but their buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is tied is there already
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
