"""Finds the objects of other packages that hold parameters."""

from __future__ import annotations

import gc
from collections.abc import Container, Iterator
from typing import Any


def live(names: Container[str]) -> Iterator[tuple[str, Any]]:
    """All live objects whose class, or a base of it, has one of these names, with that name. Looks at every object.

    By the names: such classes move from module to module, are imported late, or belong to other packages.
    """
    objects = gc.get_objects()
    kinds = {id(kind): kind for kind in map(type, objects)}  # by id: a class need not be hashable
    found = {key: base.__name__ for key, kind in kinds.items() for base in kind.__mro__ if base.__name__ in names}
    return ((found[id(type(one))], one) for one in objects if id(type(one)) in found)
