"""Codes: tensors in, stored parts out, and back. Each code is one class in one file, with `encode` above `decode`.

A new code takes one file and one line in `registry.py`. Codes know nothing about models or checkpoint folders.
"""
