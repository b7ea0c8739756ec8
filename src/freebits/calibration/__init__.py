"""Measures how much a model's output depends on each matrix: text, engine, observers and sensitivities.

Rounding weights according to these measurements belongs in `quantization`.
"""
