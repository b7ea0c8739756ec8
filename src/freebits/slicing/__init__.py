"""SliceGPT in float64: principal axes of the residual stream, found block by block on calibration text."""

from freebits.slicing.axes import principal_axes
from freebits.slicing.slicer import Runner, sliced_size, sliced_tensors

__all__ = ["Runner", "principal_axes", "sliced_size", "sliced_tensors"]
