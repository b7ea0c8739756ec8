"""Maps one model to another: slicing (lossy); folding, rotation and canonical forms (function-preserving).

Each transform names its fidelity. Reading models belongs in `storage`, rounding weights in `quantization`.
"""
