"""Transforms, which map one model to another.

Slicing is lossy. Folding, rotation and canonical forms preserve the function of a model. Code that reads models belongs
in `storage`, and code that rounds weights belongs in `quantization`.
"""
