"""Reads and writes checkpoint folders: safetensors and GGUF files, staging directories, URLs, signatures.

Code for a new place to store checkpoints belongs here. Code that interprets tensors as parts of a model does not.
"""
