"""Reads checkpoints that other tools have quantized (FP8, MXFP4, NVFP4, INT4, GPTQ, AWQ) as floats.

To add an input format, write a class and add it to `source.FORMATS`. Formats that freebits writes are in `codecs`.
"""
