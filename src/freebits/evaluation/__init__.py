"""Measure models and folders: perplexity, KL divergence, tasks, sizes, reports and model cards.

Put new evaluations here. No module here writes a checkpoint.
"""
