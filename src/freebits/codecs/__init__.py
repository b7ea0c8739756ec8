"""Codes, which turn tensors into stored parts and back. A code is a class with the interface in `base.py`.

To add a code, write its class and one line in `registry.py`. Codes do not depend on models or checkpoint folders.
"""
