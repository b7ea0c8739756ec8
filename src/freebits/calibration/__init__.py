"""Run a model on text, and measure how much the model's output depends on each matrix.

`quantization` rounds the matrices according to these measurements.
"""
