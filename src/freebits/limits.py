"""Upper bounds on the sizes that files declare, and the maximum length of messages.

Readers check a size before they allocate memory of this size. Only `JSON_DEPTH` is checked after the file is parsed.
"""

JSON_BYTES, JSON_DEPTH = 2**27, 100
"""`JSON_BYTES`: size of a config, index or manifest. `JSON_DEPTH`: depth to which its objects and arrays are nested."""
HEADER_BYTES = 100_000_000
"""Bytes of a safetensors header; the safetensors library has the same bound."""
TENSOR_VALUES = 2**40
"""Number of values in a tensor."""
RECIPE_STEPS = 16
"""Number of recipes that must be applied one after another to decode a tensor of the model."""
BASES = 8
"""Number of bases that a packed folder needs: its base, the base of its base, and so on."""
BLOCKS = 4096
"""Number of blocks in a config without weights. With weights, the number of tensors bounds the number of blocks."""
WIDTH = 2**31
"""Width or rank of a layer, and number of blocks in a config. Each must be less than this bound."""
EXPANSION, EXPANSION_FREE = 256, 2**28
"""`EXPANSION`: decoded bytes per stored byte of a packed folder. `EXPANSION_FREE`: decoded bytes allowed on top."""
COPIED_BYTES = 2**27
"""Bytes of an auxiliary file that is downloaded when a URL is opened."""
MESSAGE = 600
"""Characters of an error message. A longer message loses its middle."""


def check_expansion(stored: int, decoded: int) -> None:
    """Check that a folder does not declare many more decoded bytes than it stores.

    Args:
        stored: number of stored bytes.
        decoded: number of bytes that the folder declares to decode to.

    Raises:
        ValueError: the folder declares more decoded bytes than `EXPANSION` and `EXPANSION_FREE` allow.
    """
    if decoded > EXPANSION * stored + EXPANSION_FREE:
        raise ValueError(f"{stored} stored bytes would decode to {decoded} bytes, more than {EXPANSION} times as many")
