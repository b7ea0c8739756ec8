"""The packed folder: its manifest, its recipes, and the code that writes, reads and validates it.

Codes themselves belong in `codecs`. Nothing here depends on the name of a model.
"""
