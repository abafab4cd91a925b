"""The category of every warning of this package, so that one filter finds them all."""


class FastPCGradWarning(UserWarning):
    """Something works, but most likely not as it was meant; the message says what to call instead."""
