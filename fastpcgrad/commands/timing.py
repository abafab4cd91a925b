"""Rows to measure with, and times in turn."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def conflicting_rows(tasks: int, columns: int, device: str) -> Tensor:
    """J ``[tasks, columns]`` fp32, the same each time: about half of its pairs conflict."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tasks, columns, generator=generator).to(device)


def loop(rows: Tensor) -> Tensor:
    """PCGrad as a Python loop over pairs of tasks, as most implementations have it."""
    merged = torch.zeros_like(rows[0])
    for i, row in enumerate(rows):
        projected = row.clone()
        for j in random.sample(range(len(rows)), len(rows)):
            dot = torch.dot(projected, rows[j])
            if j != i and dot < 0:
                projected -= dot / rows[j].norm() ** 2 * rows[j]
        merged += projected
    return merged


def in_turn(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The median time of each call in seconds by a clock, measured one after the other again and again."""

    def timed(call: Callable[[], object]) -> float:
        start = clock()
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timed(call)
    until = time.perf_counter() + seconds
    while True:
        for name, call in calls.items():
            taken[name].append(timed(call))
        if time.perf_counter() >= until:
            return {name: statistics.median(times) for name, times in taken.items()}
