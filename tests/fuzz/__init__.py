"""Packed folders spoiled by a grammar that knows what they are made of, with every digest made right again.

`make fuzz` drives it by coverage (atheris), the tests of every run by hypothesis.
"""
