"""The format of packed folders: the manifest, and functions that pack, read, check and unpack a folder.

The manifest contains recipes, which tell readers how to decode the tensors of the model from the stored tensors.

The codes, which encode tensors, are in `codecs`. No module here depends on the name of a model.
"""
