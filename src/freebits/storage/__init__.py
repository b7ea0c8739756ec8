"""Read, write, download, upload and sign checkpoint folders. Weights are in safetensors or GGUF files.

Code for a new place to store checkpoints belongs here. Code that interprets tensors belongs in other packages.
"""
