"""Hugging Face checkpoint directories in and out, one tensor at a time."""

from freebits.checkpoint.reader import DTYPE_CODES, Checkpoint, read_json
from freebits.checkpoint.writer import REMOTE_CODE, CheckpointWriter, carry_over, new_directory

__all__ = ["DTYPE_CODES", "REMOTE_CODE", "Checkpoint", "CheckpointWriter", "carry_over", "new_directory", "read_json"]
