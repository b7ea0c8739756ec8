"""Convert models in GGUF files to floats with transformers."""

import importlib.util
import io
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from freebits.errors import UsageError
from freebits.integrations.loading import one_line_errors

REQUIRED_PACKAGES = ("gguf", "accelerate")
"""Packages of the extra `gguf` that are needed to read GGUF files."""


def missing_packages() -> list[str]:
    """Return the required packages that are not installed."""
    return [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]


def write_dense(gguf: Path, directory: Path) -> None:
    """Write a GGUF file's model and tokenizer as a dense checkpoint in float16. Memory holds the whole model.

    Raises:
        UsageError: a required package is not installed.
        CheckpointError: transformers cannot read the file.
    """
    if missing_packages():
        raise UsageError(f"reading {gguf} needs {' and '.join(missing_packages())}: run pip install 'freebits[gguf]'")
    with _quiet_without_terminal(), one_line_errors(gguf, "model"):
        options = {"gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True), **options
        )
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(directory)


def _quiet_without_terminal() -> AbstractContextManager[object]:
    """Return a context that hides stderr unless it is a terminal. The conversion prints a progress bar on stderr."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
