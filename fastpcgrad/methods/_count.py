"""Whole numbers, as the constructors of methods take them."""

from __future__ import annotations

from operator import index


def count(name: str, value: int, least: int) -> int:
    """``value`` as an int; TypeError for what is no whole number, ValueError below ``least``."""
    try:
        found = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; found {value!r}") from None
    if found < least:
        raise ValueError(f"{name} must be at least {least}; found {found}")
    return found
