"""Read checkpoints that other tools have quantized (FP8, MXFP4, NVFP4, INT4, GPTQ, AWQ), with their weights as floats.

To add an input format, write a class that implements `Format`, and add an instance to `source.FORMATS`. The formats
that freebits writes are in `codecs`.
"""
