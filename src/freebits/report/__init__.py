"""What a folder holds and how large everything is or would become."""

from freebits.report.account import bits_by_tensor, bytes_on_disk, change, dense_bytes, opened
from freebits.report.card import base_model, write_card
from freebits.report.charts import check_charts
from freebits.report.estimation import TYPICAL_ENTROPY, n_bytes, n_words, planned_forms
from freebits.report.inspection import inspect, known_sizes
from freebits.report.page import page

__all__ = [
    "TYPICAL_ENTROPY",
    "base_model",
    "bits_by_tensor",
    "bytes_on_disk",
    "change",
    "check_charts",
    "dense_bytes",
    "inspect",
    "known_sizes",
    "n_bytes",
    "n_words",
    "opened",
    "page",
    "planned_forms",
    "write_card",
]
