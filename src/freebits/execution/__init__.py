"""Run pieces of work on threads or Ray, store the results of finished pieces, and report progress.

A new backend implements `executor.Executor`. The functions that compute a piece are in other packages.
"""
