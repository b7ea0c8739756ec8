"""Decode the golden folders, compare the tensors with the golden tensors, and print JSON. Needs only freebits.

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
    """Print for each codec the number of values, of differing values, and the largest difference in ULPs.

    A ULP (unit in the last place) is the distance from a 16-bit value to the next one.
    """
    golden = Path(sys.argv[1])
    counts = {}
    for file in sorted(golden.glob("*.safetensors")):
        expected, decoded = load_file(file), dict(PackedFolder(golden / file.stem).model_tensors())
        differences = [
            (decoded[name].view(torch.int16).int() - tensor.view(torch.int16).int()).abs()
            for name, tensor in expected.items()
        ]
        n_values, n_different = (
            sum(ulps.numel() for ulps in differences),
            sum(int((ulps > 0).sum()) for ulps in differences),
        )
        counts[file.stem] = [n_values, n_different, max(int(ulps.max()) for ulps in differences if ulps.numel())]
    environment = f"Python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"with": environment, "capability": capability, "found": counts}))  # noqa: T201


if __name__ == "__main__":
    main()
