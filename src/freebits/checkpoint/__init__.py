"""Hugging Face checkpoint folders in and out, one tensor at a time."""

from freebits.checkpoint.atomic import new_directory
from freebits.checkpoint.beside import (
    CARD,
    CARD_MARK,
    REMOTE_CODE,
    auto_map,
    carry_code,
    carry_over,
    copy,
    kept_cards,
    restore_card,
    stays_inside,
    write_remote_code,
)
from freebits.checkpoint.drafts import Task, text_digest
from freebits.checkpoint.folder import (
    CONFIG,
    INDEX,
    Checkpoint,
    Source,
    existing_folder,
    model_files,
    read_json,
    read_text,
    write_json,
)
from freebits.checkpoint.hub import located, push
from freebits.checkpoint.remote import exists, fill, original, url_of
from freebits.checkpoint.weights import ENTRY, LENGTH, Entry, WeightsFile, WeightsWriter, parse_header
from freebits.checkpoint.writer import CheckpointWriter, shard_bytes

__all__ = [
    "CARD",
    "CARD_MARK",
    "CONFIG",
    "ENTRY",
    "INDEX",
    "LENGTH",
    "REMOTE_CODE",
    "Checkpoint",
    "CheckpointWriter",
    "Entry",
    "Source",
    "Task",
    "WeightsFile",
    "WeightsWriter",
    "auto_map",
    "carry_code",
    "carry_over",
    "copy",
    "existing_folder",
    "exists",
    "fill",
    "kept_cards",
    "located",
    "model_files",
    "new_directory",
    "original",
    "parse_header",
    "push",
    "read_json",
    "read_text",
    "restore_card",
    "shard_bytes",
    "stays_inside",
    "text_digest",
    "url_of",
    "write_json",
    "write_remote_code",
]
