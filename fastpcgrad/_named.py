"""What users choose by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Chosen = TypeVar("Chosen")


def named(argument: str, name: object, choices: Mapping[str, Chosen]) -> Chosen:
    """What has that name; ValueError shows what was asked for and what there is."""
    try:
        return choices[name]  # type: ignore[index]
    except (KeyError, TypeError):
        raise ValueError(f"{argument} must be one of {', '.join(choices)}; found {name!r}") from None
