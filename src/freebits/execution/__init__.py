"""Runs pieces of work on threads or Ray, stores finished pieces and reports progress.

A new backend implements `executor.Executor`. The functions that compute a piece are in other packages.
"""
