"""What is known of a model's residual stream: the text that runs through it, and its principal axes."""

from freebits.calibration.axes import covariance, principal_axes
from freebits.calibration.stream import AtSite, Runner, perplexity
from freebits.calibration.text import embedded_text

__all__ = ["AtSite", "Runner", "covariance", "embedded_text", "perplexity", "principal_axes"]
