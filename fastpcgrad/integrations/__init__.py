"""Gradient surgery where people work: one module for each trainer, which is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from .settings import Surgery as Surgery

_MODULES = (
    "accelerate",
    "jax",
    "libmtl",
    "lightning",
    "sentence_transformers",
    "torchjd",
    "transformers",
    "trl",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has Surgery and {', '.join(_MODULES)}")


def __dir__() -> list[str]:
    return ["Surgery", *_MODULES]
