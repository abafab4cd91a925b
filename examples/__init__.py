"""Runnable scripts on real data: ``python -m examples.multidigits`` from the repository root."""
