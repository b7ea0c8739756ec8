"""Importing this module registers the configs and models of freebits with transformers' Auto classes."""

from freebits.integrations import packed_models
from freebits.models import low_rank, sliced

__all__ = ["low_rank", "packed_models", "sliced"]
