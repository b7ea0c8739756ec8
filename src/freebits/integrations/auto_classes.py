"""Register the configs and models of freebits with transformers' Auto classes when this module is imported."""

from freebits.integrations import packed_models
from freebits.models import low_rank, sliced

__all__ = ["low_rank", "packed_models", "sliced"]
