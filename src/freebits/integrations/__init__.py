"""Connects freebits to transformers, PEFT and SliceGPT: Auto classes, loading, tensor names, trainable adapters.

Everything that depends on how another library works inside belongs here. Commands belong in `api`.
"""
