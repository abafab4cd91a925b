"""The T×T problems of several methods, as csrc/solvers has them, in NumPy and torch."""
