"""Finds and loads the compiled libraries in the package, keeps why one could not be loaded."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Literal

ABI_VERSION = 7
LibraryName = Literal["cpu", "cuda"]


def library(name: LibraryName) -> ctypes.CDLL | None:
    """Load a compiled library once a process; ``None`` where that is impossible (``load_error`` says why).

    Args:
        name: ``"cpu"`` or ``"cuda"``.
    """
    return _load(name)[0]


def load_error(name: LibraryName) -> str | None:
    """Say why ``library(name)`` is ``None``; ``None`` where it loaded.

    Args:
        name: ``"cpu"`` or ``"cuda"``.
    """
    return _load(name)[1]


@cache
def _load(name: LibraryName) -> tuple[ctypes.CDLL | None, str | None]:
    return _open(Path(__file__).parent.with_name(f"libfastpcgrad_{name}.so"))


def _open(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    if not path.exists():
        return None, _why_missing(path)
    try:
        loaded = ctypes.CDLL(str(path))
        found = loaded.fpg_abi_version
    except (OSError, AttributeError) as error:  # what cannot be loaded; what is no library of this package
        return None, f"{path} cannot be loaded: {error}"
    found.argtypes, found.restype = [], ctypes.c_int
    if (version := found()) != ABI_VERSION:
        return None, f"{path} has ABI version {version}, this package needs {ABI_VERSION}: {_REBUILD}"
    return loaded, None


def _why_missing(path: Path) -> str:
    note = path.with_suffix(".missing")
    if note.exists():
        return f"{path.name} was not built: {note.read_text(encoding='utf-8').strip()}"
    return f"{path} does not exist: {_REBUILD}"


_REBUILD = "build it with 'pip install .', or in a source tree with 'python setup.py build_ext --inplace'"
