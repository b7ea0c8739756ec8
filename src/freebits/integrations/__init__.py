"""Connect freebits to transformers and PEFT: Auto classes, loading, tensor names, and trainable adapters.

All code that depends on the internals of another library belongs here. Commands belong in `api`.
"""
