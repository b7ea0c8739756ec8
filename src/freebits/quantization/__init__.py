"""Round matrices so that the model's output suffers least: feedback, and what it rounds to."""

from freebits.quantization.budget import Budget, Fixed, Rolling
from freebits.quantization.feedback import feedback, inverse_factor
from freebits.quantization.grids import GROUP, gridded
from freebits.quantization.pyramids import pyramids
from freebits.quantization.stepping import DAMPING, Sensitivity, row_steps, stepped, typical_steps

__all__ = [
    "DAMPING",
    "GROUP",
    "Budget",
    "Fixed",
    "Rolling",
    "Sensitivity",
    "feedback",
    "gridded",
    "inverse_factor",
    "pyramids",
    "row_steps",
    "stepped",
    "typical_steps",
]
