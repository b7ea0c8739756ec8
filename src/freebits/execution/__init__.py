"""Runs pieces of work on threads or Ray, stores finished pieces and reports progress.

A new backend implements `executor.Executor`. What a piece of work computes belongs in the other packages.
"""
