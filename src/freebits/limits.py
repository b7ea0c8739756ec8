"""Upper bounds on the sizes that files declare. Readers check each bound before they allocate memory."""

JSON_BYTES, JSON_DEPTH = 2**27, 100
"""`JSON_BYTES`: size of a config, index or manifest. `JSON_DEPTH`: depth to which its objects and arrays are nested."""
HEADER_BYTES = 100_000_000
"""Size of a safetensors header; the safetensors library has the same bound."""
TENSOR_VALUES = 2**40
"""Number of values in a tensor."""
RECIPE_STEPS = 16
"""Number of recipes that are applied one after another to decode a tensor of the model."""
BLOCKS = 4096
"""Number of blocks in a config without weights. Otherwise, the number of tensors bounds the number of blocks."""
WIDTH = 2**31
"""Width or rank of a layer. A config with more blocks than this is rejected, too, before `BLOCKS` is checked."""
EXPANSION, EXPANSION_FREE = 256, 2**28
"""`EXPANSION`: decoded bytes per stored byte of a packed folder. `EXPANSION_FREE`: bytes allowed in addition."""
COPIED_BYTES = 2**27
"""Size of an auxiliary file that is downloaded from a URL."""
MESSAGE = 600
"""Number of characters of an error message."""


def check_expansion(stored: int, decoded: int) -> None:
    """Check that a folder does not declare many more decoded bytes than it stores.

    Raises:
        ValueError: the folder declares more decoded bytes than `EXPANSION` and `EXPANSION_FREE` allow.
    """
    if decoded > EXPANSION * stored + EXPANSION_FREE:
        raise ValueError(f"{stored} stored bytes would decode to {decoded} bytes, more than {EXPANSION} times as many")
