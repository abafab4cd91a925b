"""Timing of competitors in turn, and the machine's own copy and read bandwidth.

All competitors of a case run in one process and take turns: each round calls every one of them once, in an
order shuffled anew for each round. A ratio is the median over rounds of (time of one) / (time of the other in
the same round), so a machine that slows down for a second slows both sides of the ratios it touches. Where one is so
slow that they share one round or two, a single hiccup would be the ratio: there it is that of their medians.
"""

from __future__ import annotations

import gc
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class Subject:
    """A competitor: named phases that run in sequence each round and are timed one by one."""

    name: str
    phases: Mapping[str, Callable[[], object]]


@dataclass
class Samples:
    """Milliseconds of one phase by round. A round that the subject sat out is absent.

    ``cold``: the only sample is the first call of all, since a second one was not affordable.
    """

    by_round: dict[int, float] = field(default_factory=dict)
    cold: bool = False

    @property
    def rounds(self) -> int:
        return len(self.by_round)

    @property
    def values(self) -> list[float]:
        return list(self.by_round.values())


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


def percentile(values: Iterable[float], percent: float) -> float:
    """Linear interpolation between the order statistics, as numpy does by default."""
    return float(np.percentile(list(values), percent))


def paired_ratio(samples: Samples, other: Samples) -> float:
    """Median over common rounds of ``samples / other``; of the medians where they share fewer than three."""
    common = sorted(samples.by_round.keys() & other.by_round.keys())
    if len(common) < 3:
        return statistics.median(samples.values) / statistics.median(other.values)
    return statistics.median(samples.by_round[r] / other.by_round[r] for r in common)


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


def _timed(subject: Subject) -> dict[str, float]:
    elapsed = {}
    for phase, call in subject.phases.items():
        start = time.perf_counter_ns()
        # The result dies after the clock is read: freeing it is its owner's business, not the op's.
        result = call()
        elapsed[phase] = (time.perf_counter_ns() - start) / 1e6
        del result
    return elapsed


def _warm_up(subject: Subject, plan: Plan) -> tuple[dict[str, float], float]:
    """The first call's phases, and the seconds of the fastest of up to three calls."""
    first = _timed(subject)
    seconds = sum(first.values()) / 1e3
    # A first call that is somewhat slow may have been held up: only a second one tells.
    again = 2 if seconds <= plan.slow else 1 if seconds <= min(4 * plan.slow, plan.cold) else 0
    for _ in range(again):
        seconds = min(seconds, sum(_timed(subject).values()) / 1e3)
    return first, seconds


def in_turn(subjects: Sequence[Subject], plan: Plan, seed: int = 0) -> dict[str, dict[str, Samples]]:
    """Times the subjects in turn; the answer is by subject name, then by phase."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _in_turn(subjects, plan, random.Random(seed))
    finally:
        if collecting:
            gc.enable()


def _in_turn(subjects: Sequence[Subject], plan: Plan, shuffler: random.Random) -> dict[str, dict[str, Samples]]:
    samples = {subject.name: {phase: Samples() for phase in subject.phases} for subject in subjects}
    rounds: dict[str, int] = {}
    for subject in subjects:
        first, seconds = _warm_up(subject, plan)
        rounds[subject.name] = plan.rounds(seconds)
        if rounds[subject.name] == 0:
            for phase, value in first.items():
                samples[subject.name][phase] = Samples({-1: value}, cold=True)
    most = max(rounds.values(), default=0)
    chosen = {name: spread_rounds(count, most) for name, count in rounds.items()}
    for index in range(most):
        turn = [s for s in subjects if index in chosen[s.name]]
        shuffler.shuffle(turn)
        for subject in turn:
            for phase, value in _timed(subject).items():
                samples[subject.name][phase].by_round[index] = value
    return samples


@dataclass(frozen=True)
class Rate:
    """Bytes read and written per second (in GB/s, 10⁹) by the fastest of several candidates."""

    gigabytes_per_second: float
    candidate: str


@dataclass(frozen=True)
class Bandwidth:
    """What this machine reached in this process.

    ``read``: bytes of a fp32 array of 512 MB over the time of the fastest reduction of it.
    ``copy``: bytes read plus bytes written over the time of the fastest copy of it.
    The best candidate's median counts, so a fraction of it is not flattered by a slow baseline.
    """

    read: Rate
    copy: Rate

    def best_of(self, other: Bandwidth) -> Bandwidth:
        def faster(a: Rate, b: Rate) -> Rate:
            return a if a.gigabytes_per_second >= b.gigabytes_per_second else b

        return Bandwidth(faster(self.read, other.read), faster(self.copy, other.copy))


def _on_threads(threads: int, call: Callable[[int], object]) -> None:
    """``call(i)`` on each of several Python threads; copies and dots free the interpreter lock."""
    workers = [threading.Thread(target=call, args=(i,)) for i in range(1, threads)]
    for worker in workers:
        worker.start()
    call(0)
    for worker in workers:
        worker.join()


class BandwidthProbe:
    """Two arrays of 512 MB each and several ways to copy or read them with ``threads`` threads."""

    ELEMENTS = 1 << 27

    def __init__(self, threads: int, elements: int = ELEMENTS) -> None:
        self.bytes = 4 * elements
        self._source = torch.ones(elements)
        self._target = torch.zeros(elements)
        source, target = self._source.numpy(), self._target.numpy()
        halves = [
            (part, out)
            for part, out in zip(np.array_split(source, threads), np.array_split(target, threads), strict=True)
        ]
        tensors = [torch.from_numpy(part) for part, _ in halves]
        self._copies: dict[str, Callable[[], object]] = {
            "torch copy_": lambda: self._target.copy_(self._source),
            "numpy copyto": lambda: np.copyto(target, source),
            f"numpy copyto, {threads} threads": lambda: _on_threads(
                threads, lambda i: np.copyto(halves[i][1], halves[i][0])
            ),
        }
        self._reads: dict[str, Callable[[], object]] = {
            "torch sum": lambda: self._source.sum(),
            "torch dot": lambda: torch.dot(self._source, self._source),
            "torch dot of two halves": lambda: torch.dot(self._source[: elements // 2], self._source[elements // 2 :]),
            f"torch dot, {threads} threads": lambda: _on_threads(threads, lambda i: torch.dot(tensors[i], tensors[i])),
        }

    def measure(self, plan: Plan) -> Bandwidth:
        read = self._best(self._reads, self.bytes, plan)
        copy = self._best(self._copies, 2 * self.bytes, plan)
        return Bandwidth(read, copy)

    def subject(self, name: str, candidate: str) -> Subject:
        """The candidate as a competitor, to take turns with what is compared with the machine."""
        return Subject(name, {"call": (self._reads | self._copies)[candidate]})

    def _best(self, candidates: Mapping[str, Callable[[], object]], moved: int, plan: Plan) -> Rate:
        samples = in_turn([Subject(name, {"call": call}) for name, call in candidates.items()], plan)
        medians = {name: percentile(phases["call"].values, 50) for name, phases in samples.items()}
        name = min(medians, key=lambda key: medians[key])
        return Rate(moved / medians[name] / 1e6, name)
