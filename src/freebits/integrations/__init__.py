"""Connects freebits to transformers, PEFT and SliceGPT: Auto classes, loading, tensor names, trainable adapters.

All code that depends on the internals of another library belongs here. Commands belong in `api`.
"""
