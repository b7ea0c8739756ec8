"""Hugging Face checkpoint directories in and out, one tensor at a time."""

from freebits.checkpoint.reader import DTYPE_CODES, DTYPES, HEADER_LENGTH, Checkpoint, header_of, read_json
from freebits.checkpoint.writer import REMOTE_CODE, CheckpointWriter, SafetensorsFile, carry_over, new_directory

__all__ = [
    "DTYPES",
    "DTYPE_CODES",
    "HEADER_LENGTH",
    "REMOTE_CODE",
    "Checkpoint",
    "CheckpointWriter",
    "SafetensorsFile",
    "carry_over",
    "header_of",
    "new_directory",
    "read_json",
]
