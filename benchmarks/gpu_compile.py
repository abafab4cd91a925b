"""Compiles the Triton kernels that a run is about to measure, each T and dtype in a process of its own.

Triton compiles in the process that calls, one kernel after the other and a second or two each. What another process
compiled, it finds in its cache on disk.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from fastpcgrad import backends, variants
from fastpcgrad._blocks import Blocks, addresses
from fastpcgrad.variants import Guards

WIDTH = 4096
"""A kernel depends on T, the dtype and whether rows are 16-byte aligned (``backends/triton/choices.py``), not on N."""


def compile_kernels(tasks: int, dtype: torch.dtype, device: str) -> None:
    """Of all ops on packed, aligned rows without segments, and on blocks."""
    from fastpcgrad.backends import triton

    grads = torch.randn(tasks, WIDTH, dtype=dtype, device=device)
    order = variants.get("paper").draw_orders(tasks, None, None).to(device)
    triton.mix_(grads, torch.eye(tasks, dtype=torch.float64, device=device), None)
    out = grads.new_empty(WIDTH)
    triton.pcgrad(grads, order, Guards(), 1.0, None, out)
    triton.pcgrad_blocks(one_block(grads), order, Guards(), 1.0, [out])


def one_block(grads: Tensor) -> Blocks:
    """Packed rows as a block."""
    rows = [[row] for row in grads]
    return Blocks(rows, list(map(addresses, rows)), array("q", [grads.shape[1]]), grads.dtype, grads.device)


def compile_all(shapes: Sequence[tuple[int, torch.dtype]], device: str) -> None:
    """Those with many rows first: they take longest."""
    in_processes(compile_kernels, sorted(shapes, key=lambda shape: -shape[0]), device)


def in_processes(compile_some: Callable[..., None], kinds: Sequence[tuple[Any, ...]], device: str) -> None:
    """``compile_some(*kind, device)`` for all kinds, begun in this order. What fails here fails again when measured."""
    if backends.why_unavailable("triton", device) is not None:
        return
    start = time.monotonic()
    # Spawned, not forked: a fork of a process that uses the GPU cannot use it.
    with ProcessPoolExecutor(min(len(kinds), os.cpu_count() or 1), get_context("spawn")) as pool:
        compiled = [pool.submit(compile_some, *kind, device) for kind in kinds]
        for kind, result in zip(kinds, compiled, strict=True):
            if (error := result.exception()) is not None:
                print(f"compiling {kind}: {type(error).__name__}: {error}", flush=True)
    print(f"Triton kernels of {len(kinds)} kinds: {time.monotonic() - start:.0f} s", flush=True)
