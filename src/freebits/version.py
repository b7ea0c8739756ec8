"""The version, read by the build and written into every packed checkpoint."""

__version__ = "0.1.0.dev0"
