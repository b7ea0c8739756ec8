"""Reads and writes checkpoint folders: safetensors and GGUF files, staging directories, remote addresses, signatures.

A new place to store checkpoints belongs here. What tensors mean for a model does not.
"""
