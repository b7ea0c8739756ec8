"""Measure how much a model's output depends on each matrix: text, engine, observers and sensitivities.

`quantization` rounds weights according to these measurements.
"""
