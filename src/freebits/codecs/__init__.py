"""Codes: each turns tensors into stored parts and back. Each code is one class in one file.

To add a code, write one file and one line in `registry.py`. Codes know nothing about models or checkpoint folders.
"""
