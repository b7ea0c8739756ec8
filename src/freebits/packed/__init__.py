"""The format of packed folders: its manifest and recipes, and functions that pack, read, check and unpack a folder.

The codes, which encode tensors, are in `codecs`. No module here depends on the name of a model.
"""
