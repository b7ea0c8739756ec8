"""Map one model to another: slicing (lossy); folding, rotation and canonical forms (function-preserving).

Each transform states its fidelity. Reading models belongs in `storage`, rounding weights in `quantization`.
"""
