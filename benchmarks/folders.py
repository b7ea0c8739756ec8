"""What lies in a model's folder, packed or not."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def weights_file(folder: Path) -> Path:
    """The safetensors file of a folder that has one."""
    [file] = folder.glob("*.safetensors")
    return file


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Its tensors as they are stored."""
    return load_file(weights_file(folder))
