"""Times of calls that a GPU has queued: events in its stream around each, no waiting in between.

Where there is no GPU, calls are done when they return, and the host's clock stands in: so the benchmarks are tested.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOW = 100.0
"""Milliseconds of a call that is made three times in all."""
LEAST, MOST = 7, 50


class _HostEvent:
    at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _HostEvent) -> float:
        return 1e3 * (end.at - self.at)


def event() -> Any:
    """What ``record()`` marks in the device's time; ``elapsed_time(later)`` in milliseconds."""
    return torch.cuda.Event(enable_timing=True) if DEVICE == "cuda" else _HostEvent()


def synchronize() -> None:
    """Wait until what was queued is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    p20: float
    p50: float
    p80: float
    rounds: int


def timed(call: Callable[[], object], seconds: float = 0.04, calls_of_one: int = 1) -> Timing:
    """Of one of the ``calls_of_one`` that ``call`` makes; its rounds take about ``seconds`` together."""
    _times(call, 1)  # compiles, and loads what is loaded at first use
    times = _times(call, 1)
    if times[0] > SLOW:
        times += _times(call, 1)
    else:
        times = _times(call, max(LEAST, min(MOST, int(1e3 * seconds / max(times[0], 1e-3)))))
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    p20, p50, p80 = (value / calls_of_one for value in (p20, statistics.median(times), p80))
    return Timing(p20, p50, p80, len(times))


def _times(call: Callable[[], object], rounds: int) -> list[float]:
    events = [(event(), event()) for _ in range(rounds)]
    for before, after in events:
        before.record()
        call()
        after.record()
    synchronize()
    return [before.elapsed_time(after) for before, after in events]


def replays_of(call: Callable[[], object], count: int) -> Callable[[], None]:
    """Captures the call in a CUDA graph; what is returned replays it ``count`` times."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replays() -> None:
        for _ in range(count):
            graph.replay()

    return replays
