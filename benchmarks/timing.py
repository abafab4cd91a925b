"""Timing of competitors in turn, on a CPU or in the stream of a GPU.

All competitors of a case run in one process and take turns: each round calls every one of them once, in an order
shuffled anew for each round. A ratio is the median over rounds of (time of one) / (time of the other in the same
round), so a machine that slows down for a second slows both sides of the ratios it touches. Where one is so slow that
they share one round or two, a single hiccup would be the ratio: there it is that of their medians.

On a GPU events in its stream stand around each phase, and nothing waits in between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.rows import Row, failed

Call = Callable[[], object]
Phases = Mapping[str, Call]
"""What is done in sequence each round, each phase timed by itself."""


class Clock:
    """Of the host. On a machine that others use, what a process takes of the CPU says more than what passes by."""

    nanoseconds = staticmethod(time.perf_counter_ns)
    note = ""

    @classmethod
    def take_cpu_time(cls) -> None:
        cls.nanoseconds, cls.note = staticmethod(time.process_time_ns), "CPU time"


class _HostEvent:
    """What a CPU has done when the call returns needs no stream: the host's clock."""

    at = 0

    def record(self) -> None:
        self.at = Clock.nanoseconds()

    def elapsed_time(self, end: _HostEvent) -> float:
        return (end.at - self.at) / 1e6


def _event(device: str) -> Any:
    """What ``record()`` marks in the device's time; ``elapsed_time(later)`` in milliseconds."""
    return torch.cuda.Event(enable_timing=True) if device == "cuda" else _HostEvent()


def _synchronize(device: str) -> None:
    """Wait until what was queued is done."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Samples:
    """Milliseconds of one phase by round. A round that the subject sat out is absent.

    ``cold``: the only sample is the first call of all, since a second one was not affordable.
    """

    by_round: dict[int, float] = field(default_factory=dict)
    cold: bool = False

    @classmethod
    def of(cls, values: Iterable[float], cold: bool = False) -> Samples:
        return cls(dict(enumerate(values)), cold)

    @property
    def rounds(self) -> int:
        return len(self.by_round)

    @property
    def values(self) -> list[float]:
        return list(self.by_round.values())

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def over(self, divisor: float) -> Samples:
        return Samples({r: value / divisor for r, value in self.by_round.items()}, self.cold)


@dataclass(frozen=True)
class Plan:
    """How many rounds a subject gets: what ``seconds`` pays for, within ``least`` and ``most``.

    A subject whose one call takes longer than ``slow`` seconds gets at least ``slow_least`` rounds instead;
    one whose call takes longer than ``cold`` seconds gets none: its first call is its only sample.
    """

    seconds: float
    least: int = 7
    most: int = 60
    slow: float = 0.5
    slow_least: int = 1
    cold: float = 8.0

    def rounds(self, call_seconds: float) -> int:
        if call_seconds > self.cold:
            return 0
        affordable = int(self.seconds / max(call_seconds, 1e-9))
        least = self.least if call_seconds <= self.slow else self.slow_least
        return min(self.most, max(least, affordable))


def with_times(row: Row, samples: Samples) -> Row:
    """The row with the percentiles: linear interpolation between the order statistics."""
    p20, p50, p80 = (float(value) for value in np.percentile(samples.values, (20, 50, 80)))
    return dataclasses.replace(row, p20_ms=p20, p50_ms=p50, p80_ms=p80, rounds=samples.rounds, cold=samples.cold)


def paired_ratio(samples: Samples, other: Samples) -> float:
    """Median over common rounds of ``samples / other``; of the medians where they share fewer than three."""
    common = sorted(samples.by_round.keys() & other.by_round.keys())
    if len(common) < 3:
        return samples.median / other.median
    return statistics.median(samples.by_round[r] / other.by_round[r] for r in common)


def ratios(name: str, samples: Mapping[str, Samples]) -> dict[str, float]:
    """Of one subject to each of the others."""
    return {other: paired_ratio(samples[name], samples[other]) for other in samples if other != name}


def total(phases: Iterable[Samples]) -> Samples:
    """The sum of several phases, round by round."""
    parts = list(phases)
    common = set.intersection(*(set(part.by_round) for part in parts))
    by_round = {r: sum(part.by_round[r] for part in parts) for r in sorted(common)}
    return Samples(by_round, any(part.cold for part in parts))


def spread_rounds(rounds: int, of: int) -> set[int]:
    """``rounds`` of the rounds 0..``of``-1, spread evenly.

    They are the first in bit-reversed order. So the rounds of the slower are a subset of those of the faster, and
    any two share as many rounds as the slower of them has.
    """
    bits = max(1, (of - 1).bit_length())
    return set(sorted(range(of), key=lambda index: f"{index:0{bits}b}"[::-1])[:rounds])


def milliseconds(phases: Phases, device: str = "cpu") -> dict[str, float]:
    """Of each phase of one round."""
    events = [_event(device) for _ in range(len(phases) + 1)]
    events[0].record()
    for end, call in zip(events[1:], phases.values(), strict=True):
        # The result dies after the clock is read: freeing it is its owner's business, not the op's.
        result = call()
        end.record()
        del result
    _synchronize(device)
    return {phase: a.elapsed_time(b) for phase, (a, b) in zip(phases, pairwise(events), strict=True)}


def warm_up(phases: Phases, plan: Plan, device: str = "cpu") -> tuple[dict[str, float], float]:
    """The first round's phases, and the seconds of the fastest of up to three rounds."""
    first = milliseconds(phases, device)
    seconds = sum(first.values()) / 1e3
    # A first call that is somewhat slow may have been held up: only a second one tells.
    again = 2 if seconds <= plan.slow else 1 if seconds <= min(4 * plan.slow, plan.cold) else 0
    for _ in range(again):
        seconds = min(seconds, sum(milliseconds(phases, device).values()) / 1e3)
    return first, seconds


Times = dict[str, dict[str, Samples]]
"""By subject, then by phase."""


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def in_turn(
    subjects: Mapping[str, Callable[[], Phases]], plan: Plan, device: str = "cpu", seed: int = 0
) -> tuple[Times, dict[str, str]]:
    """Makes and times the subjects in turn; gives their times, and of those that raised a status that says so."""
    samples: Times = {}
    failures: dict[str, str] = {}
    ready: dict[str, Phases] = {}
    rounds: dict[str, int] = {}
    shuffler = random.Random(seed)
    with _without_collections():
        for name, build in subjects.items():
            try:
                phases = build()
                first, seconds = warm_up(phases, plan, device)
            except Exception as error:
                failures[name] = failed(error)
                continue
            ready[name], rounds[name] = phases, plan.rounds(seconds)
            cold = rounds[name] == 0
            samples[name] = {phase: Samples({-1: ms} if cold else {}, cold) for phase, ms in first.items()}
        most = max(rounds.values(), default=0)
        chosen = {name: spread_rounds(count, most) for name, count in rounds.items()}
        for index in range(most):
            if device == "cuda":
                gc.collect()  # else a cycle would keep a step's activations there
            turn = [name for name in ready if index in chosen[name]]
            for name in shuffler.sample(turn, len(turn)):
                for phase, value in milliseconds(ready[name], device).items():
                    samples[name][phase].by_round[index] = value
    return samples, failures


SLOW = 100.0
"""Milliseconds of a call that ``alone`` makes three times in all."""
LEAST, MOST = 7, 50


def alone(call: Call, device: str, seconds: float = 0.04, calls_of_one: int = 1) -> Samples:
    """One of the ``calls_of_one`` that ``call`` makes, by itself; its rounds take about ``seconds`` together."""
    _queued(call, device, 1)  # compiles, and loads what is loaded at first use
    times = _queued(call, device, 1)
    if times[0] > SLOW:
        times += _queued(call, device, 1)
    else:
        times = _queued(call, device, max(LEAST, min(MOST, int(1e3 * seconds / max(times[0], 1e-3)))))
    return Samples.of(times).over(calls_of_one)


def _queued(call: Call, device: str, rounds: int) -> list[float]:
    events = [(_event(device), _event(device)) for _ in range(rounds)]
    for before, after in events:
        before.record()
        call()
        after.record()
    _synchronize(device)
    return [before.elapsed_time(after) for before, after in events]


def replays_of(call: Call, count: int) -> Call:
    """Captures the call in a CUDA graph; what is returned replays it ``count`` times."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replays() -> None:
        for _ in range(count):
            graph.replay()

    return replays
