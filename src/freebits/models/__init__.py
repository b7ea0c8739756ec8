"""Describes model families as data, and holds the modules that sliced and low-rank models run.

A new family takes one row in `families.py`. Algorithms that change a model belong in `transforms`.
"""
