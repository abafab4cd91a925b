"""How fast this machine, or its GPU, copies and reads memory: each by the fastest of several ways."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Call, Plan, in_turn

ELEMENTS = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Of each of the two fp32 arrays."""
PASSES = {"read": 1, "copy": 2}
"""How often an op moves the bytes of an array."""


def _on_threads(threads: int, call: Callable[[int], object]) -> None:
    """``call(i)`` on each of several Python threads; copies and dots free the interpreter lock."""
    workers = [threading.Thread(target=call, args=(i,)) for i in range(1, threads)]
    for worker in workers:
        worker.start()
    call(0)
    for worker in workers:
        worker.join()


def reads(source: Tensor, threads: int = 1) -> dict[str, Call]:
    """The ways to read a flat tensor once."""
    ways: dict[str, Call] = {"torch sum": source.sum}
    if source.is_cuda:
        return ways | {"torch amax": source.amax}
    ways["torch dot"] = lambda: torch.dot(source, source)
    if threads > 1:
        half, parts = len(source) // 2, source.tensor_split(threads)
        ways["torch dot of two halves"] = lambda: torch.dot(source[:half], source[half : 2 * half])
        ways[f"torch dot, {threads} threads"] = lambda: _on_threads(threads, lambda i: torch.dot(parts[i], parts[i]))
    return ways


def copies(source: Tensor, target: Tensor, threads: int = 1) -> dict[str, Call]:
    ways: dict[str, Call] = {"torch copy_": lambda: target.copy_(source)}
    if source.is_cuda:
        return ways
    a, b = source.numpy(), target.numpy()
    parts = list(zip(np.array_split(b, threads), np.array_split(a, threads), strict=True))
    ways["numpy copyto"] = lambda: np.copyto(b, a)
    ways[f"numpy copyto, {threads} threads"] = lambda: _on_threads(threads, lambda i: np.copyto(*parts[i]))
    return ways


def fastest(ways: dict[str, Call], device: str = "cpu") -> tuple[str, Call]:
    """The way with the smallest median, by a short look in turn."""
    times, _ = in_turn({name: functools.partial(dict, call=call) for name, call in ways.items()}, Plan(0.5), device)
    name = min(times, key=lambda way: times[way]["call"].median)
    return name, ways[name]


class Probe:
    """Two arrays, made when they are needed, and the ways to copy one to the other and to read one."""

    def __init__(self, threads: int = 1, device: str = "cpu", elements: int | None = None) -> None:
        self._threads, self._device, self._elements = threads, device, elements or ELEMENTS[device]
        self.bytes = {op: passes * 4 * self._elements for op, passes in PASSES.items()}
        self.size = f"{4 * self._elements >> 20} MiB fp32"
        self._fastest: dict[str, Call] = {}

    @functools.cached_property
    def arrays(self) -> tuple[Tensor, Tensor]:
        return torch.ones(self._elements, device=self._device), torch.zeros(self._elements, device=self._device)

    @functools.cached_property
    def ways(self) -> dict[str, dict[str, Call]]:
        return {"read": reads(self.arrays[0], self._threads), "copy": copies(*self.arrays, self._threads)}

    def fastest(self, op: str) -> Call:
        if op not in self._fastest:
            _, self._fastest[op] = fastest(self.ways[op])
        return self._fastest[op]
