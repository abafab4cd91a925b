"""Finds and loads the compiled libraries beside this file, keeps why one could not be loaded; memory hints."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Literal

import torch  # first: a library loaded after torch shares its OpenMP runtime, and so its one thread pool

ABI_VERSION = 5
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
    return _open(Path(__file__).with_name(f"libfastpcgrad_{name}.so"))


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

_HUGE_FROM = 4 << 20  # bytes; below, a page fault more or less does not matter
_PAGE = 4096
_MADV_HUGEPAGE = 14


def prefer_huge_pages(fresh: torch.Tensor) -> torch.Tensor:
    """Ask Linux to back a large CPU tensor, just allocated, with huge pages; returns the tensor.

    Memory that was never touched costs a page fault every 4 KiB: for a result of 64 MiB more than reading a J of
    512 MiB. It is a hint: where the kernel does not take it, nothing changes.
    """
    if fresh.is_cpu and fresh.nbytes >= _HUGE_FROM and sys.platform == "linux":
        first = -(-fresh.data_ptr() // _PAGE) * _PAGE
        length = (fresh.data_ptr() + fresh.nbytes - first) // _PAGE * _PAGE
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return fresh


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
