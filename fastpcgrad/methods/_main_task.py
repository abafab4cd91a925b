"""Methods in which task 0 comes first, and serves the others or is served by them."""

from __future__ import annotations

from collections.abc import Sequence


def check_main(method: object, role: str, tasks: Sequence[int]) -> None:
    """ValueError where task 0 is absent, whose part in the method is ``role``."""
    if 0 not in tasks:
        raise ValueError(
            f"{type(method).__name__} has task 0 as its {role}, which is absent; found tasks {list(tasks)}"
        )
