"""Measures models and folders: perplexity, KL divergence, tasks, sizes, reports and model cards.

A new evaluation belongs here. Nothing here writes a checkpoint.
"""
