"""The version. The build reads it, and every packed checkpoint contains it."""

__version__ = "0.1.0.dev0"
