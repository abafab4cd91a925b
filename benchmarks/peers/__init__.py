"""The implementations that fastpcgrad is compared with.

Each module here answers the same two questions: ``kernel(rows)`` returns a callable that merges the rows of J
[T, N] into one gradient, and ``step(problem, optimizer)`` returns a callable that takes the result of a
forward and leaves the merged gradient in ``.grad``. Everything that a user would do once happens before the
callable is returned. ``gradnorm_double_backward`` has a ``step`` of its own kind.
"""
