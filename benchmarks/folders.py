"""Read the weights file of a model's folder, packed or not."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def weights_file(folder: Path) -> Path:
    """Return the path of a folder's only safetensors file."""
    [file] = folder.glob("*.safetensors")
    return file


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the stored tensors of a folder, not decoded."""
    return load_file(weights_file(folder))
