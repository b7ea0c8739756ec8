"""The values of options, and the names of fidelities. This module imports nothing, so that `--help` is fast."""

CANONICAL, BITS_BACK, NONE = "canonical", "bits-back", "none"
CODECS = (CANONICAL, BITS_BACK, NONE)
ENTROPIES = ("auto", "none")
DTYPES = ("float16", "bfloat16", "float32")
INTEGERS, PYRAMID = "integers", "pyramid"
METHODS = (INTEGERS, PYRAMID)
TRELLIS = 32
"""Default number of states of the trellis of method `integers`."""
HADAMARD = "hadamard"
ROTATIONS = ("none", HADAMARD)
LINEAR, EMBEDDINGS = "linear", "embeddings"
PARTS = (LINEAR, EMBEDDINGS)
SLOPE, UNIFORM, PAPER = "slope", "uniform", "paper"
ALLOCATIONS = (SLOPE, UNIFORM, PAPER)
THREADS, RAY = "threads", "ray"
BACKENDS = (THREADS, RAY)
LOSSY, FUNCTION_PRESERVING, BIT_EXACT = "lossy", "function-preserving", "bit-exact"
"""The fidelities, from lowest to highest. A step's fidelity states what the step preserves of a model."""
