"""Decode the golden folders and compare them with their golden words; prints JSON. Needs freebits alone.

python tests/torture/decode.py GOLDEN
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from freebits.packed.reader import PackedFolder


def main() -> None:
    """Of each codec how many words there are, how many differ, and by how many steps of the last bit at most."""
    golden = Path(sys.argv[1])
    found = {}
    for words in sorted(golden.glob("*.safetensors")):
        expected, decoded = load_file(words), dict(PackedFolder(golden / words.stem).model_tensors())
        steps = [
            (decoded[name].view(torch.int16).int() - tensor.view(torch.int16).int()).abs()
            for name, tensor in expected.items()
        ]
        found[words.stem] = [sum(of.numel() for of in steps), sum(int((of > 0).sum()) for of in steps)]
        found[words.stem].append(max(int(of.max()) for of in steps if of.numel()))
    with_ = f"Python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}"
    print(json.dumps({"with": with_, "capability": torch.backends.cpu.get_cpu_capability(), "found": found}))  # noqa: T201


if __name__ == "__main__":
    main()
