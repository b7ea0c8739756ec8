"""Checkpoints whose weights are quantized already, by the formats in which others publish them, read as floats.

A format is a class that says how it recognizes a matrix and how it reads it, and one line in `FORMATS`. What freebits
itself writes is in `freebits.codes`.
"""

from freebits.quantized_inputs.source import FORMATS, Dequantized, is_quantized, readable

__all__ = ["FORMATS", "Dequantized", "is_quantized", "readable"]
