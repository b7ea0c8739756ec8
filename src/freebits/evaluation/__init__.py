"""How good a model is, and how close two models are."""

from freebits.evaluation.perplexity import evaluate
from freebits.evaluation.reporting import write_report
from freebits.evaluation.verification import verify

__all__ = ["evaluate", "verify", "write_report"]
