"""Launch Triton's kernels twice on a driver that only writes down what it is given, for a GPU that need not be there.

The second time the library launches what Triton compiled the first time. Exits with 1 where that differs from what
Triton itself launches for the same arguments. Run with ``TRITON_INTERPRET=0``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched: list[tuple[Any, ...]] = []


def looks(argument: Any) -> Any:
    """Of a tensor whatever is the same in another one of its kind."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.data_ptr() % 16
    return argument


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.source = source

    def __call__(self, *arguments: Any) -> None:
        # The grid, the stream, the function, packed metadata and hooks come first.
        launched.append((self.source.hash(), *arguments[:4], *map(looks, arguments[9:])))


class Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def calls() -> list[Callable[[], object]]:
    """Rows at multiples of 16 bytes and not, an order and segments at such and not, one segment and several."""
    from fastpcgrad.backends.triton import launch
    from fastpcgrad.variants import Guards

    memory = torch.randn(3, 4100)
    orders, offsets = torch.arange(3).repeat(4, 1).view(-1), torch.tensor([0, 0, 70, 4096])
    found: list[Callable[[], object]] = []
    for rows in (memory[:, :4096].contiguous(), memory[:, :4096], memory[:, 1:4097]):
        for order in (orders[:9].view(3, 3), orders[1:10].view(3, 3)):
            for segments in (None, offsets[1:], offsets):
                found.append(partial(launch.pcgrad, rows, order, Guards(), 1.0, segments, torch.empty(4096)))
        found.append(partial(launch.mix_, rows, torch.eye(3, dtype=torch.float64), None))
    return found


def main() -> int:
    from fastpcgrad.backends.triton.choices import Choice

    def by_triton(self: Choice, grid: tuple[int, ...], *arguments: Any) -> None:
        self._find(grid, arguments)

    driver.set_active(Driver())
    unlike, every = 0, calls()
    for number, call in enumerate(every):
        said = []
        for run in (by_triton, Choice.run, Choice.run):
            launched.clear()
            with patch.object(Choice, "run", run):
                call()
            said.append(list(launched))
        if not said[0] or not said[0] == said[1] == said[2]:
            unlike += 1
            print(f"call {number}: {said[0]}\nthen {said[2]}")
    print(f"{len(every)} calls, {unlike} of them unlike")
    return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main())
