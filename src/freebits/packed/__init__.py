"""Packed folders: the manifest, the recipes, and the code that packs, reads, validates and unpacks them.

Codes are in `codecs`. No module here depends on the name of a model.
"""
