"""Every bound on what a file may claim. Each is checked before anything is allocated for the claim."""

JSON_BYTES, JSON_DEPTH = 2**27, 100
"""Of a config, an index, a manifest: bytes, and how deep it may nest."""
HEADER_BYTES = 100_000_000
"""Of a safetensors header: the library's own bound."""
TENSOR_VALUES = 2**40
"""Of a tensor."""
RECIPE_STEPS = 16
"""From what is stored to what the model has."""
BLOCKS = 4096
"""More than any model has: a config alone, without weights, could ask for any number."""
WIDTH = 2**31
"""Of a stream, a rank, a number of blocks where there are as many tensors."""
EXPANSION, EXPANSION_FREE = 256, 2**28
"""A packed folder may make of each stored byte so many, and so many bytes besides."""
COPIED_BYTES = 2**27
"""Of a file beside the weights that is fetched from an address."""
MESSAGE = 600
"""Characters of an error, whatever a stranger's names are."""


def check_expansion(stored: int, made: int) -> None:
    """Check that decoding does not make too much of too little.

    Raises:
        ValueError: it does.
    """
    if made > EXPANSION * stored + EXPANSION_FREE:
        raise ValueError(f"{stored} bytes claim to become {made}, more than {EXPANSION} times as many")
