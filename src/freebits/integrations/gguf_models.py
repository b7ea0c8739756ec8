"""Models in GGUF files, in floats, as transformers dequantizes them."""

import importlib.util
import io
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from freebits.errors import UsageError
from freebits.integrations.loading import one_line_errors

NEEDED = ("gguf", "accelerate")
"""Packages that reading needs, of the extra `gguf`."""


def missing_packages() -> list[str]:
    """Those that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def write_dense(gguf: Path, directory: Path) -> None:
    """Write a GGUF file's model and tokenizer as an ordinary checkpoint in float16; all of it is in memory meanwhile.

    Raises:
        UsageError: a package that reads it is not installed.
        CheckpointError: transformers does not read it.
    """
    if missing_packages():
        raise UsageError(f"reading GGUF needs {', '.join(missing_packages())}: pip install 'freebits[gguf]'")
    with _quiet_unless_watched(), one_line_errors(gguf, "model"):
        file = {"gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True), **file
        )
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(gguf.parent, **file).save_pretrained(directory)


def _quiet_unless_watched() -> AbstractContextManager[object]:
    """The conversion draws its progress bar wherever it runs."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
