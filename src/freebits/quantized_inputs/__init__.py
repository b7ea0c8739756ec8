"""Reads checkpoints that other tools have quantized (FP8, MXFP4, NVFP4, INT4, GPTQ, AWQ) as floats.

A new input format takes one class, and one line in `source.FORMATS`. What freebits writes itself is in `codecs`.
"""
