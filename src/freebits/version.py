"""The version of freebits. The build reads the version from here, and packed folders record it."""

__version__ = "0.1.0.dev0"
