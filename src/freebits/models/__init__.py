"""Model families described as data, and the modules of sliced and low-rank models.

To add a family, add a row to `families.FAMILIES`. Algorithms that change a model belong in `transforms`.
"""
