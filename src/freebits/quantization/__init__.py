"""Round matrices so that the model's output suffers least: feedback, and what it rounds to."""

from freebits.quantization.budget import Budget, Rolling
from freebits.quantization.feedback import feedback, whitener
from freebits.quantization.stepping import DAMPING, Sensitivity, row_steps, stepped

__all__ = ["DAMPING", "Budget", "Rolling", "Sensitivity", "feedback", "row_steps", "stepped", "whitener"]
