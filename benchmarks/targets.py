"""The CPU targets of the design as data, each read off the rows of one run. A loss is shown as a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.cases import LARGEST_WIDTH
from benchmarks.rows import Row

SUBJECT = "fastpcgrad"


@dataclass(frozen=True)
class Found:
    """A measured value, and the case that gave it."""

    value: float
    case: str


@dataclass(frozen=True)
class Target:
    """``find`` lists every measured value that the target speaks of; the worst of them counts."""

    text: str
    sense: Literal[">=", "<="]
    limit: float
    style: Literal["times", "percent"]
    find: Callable[[Sequence[Row]], list[Found]]


@dataclass(frozen=True)
class Verdict:
    target: Target
    worst: Found | None

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.worst is None:
            return None
        if self.target.sense == ">=":
            return self.worst.value >= self.target.limit
        return self.worst.value <= self.target.limit

    @property
    def word(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]

    @property
    def limit(self) -> str:
        return f"{'≥' if self.target.sense == '>=' else '≤'} {shown(self.target.limit, self.target.style)}"

    @property
    def value(self) -> str:
        return "–" if self.worst is None else shown(self.worst.value, self.target.style)


def shown(value: float, style: Literal["times", "percent"]) -> str:
    if style == "percent":
        return f"{100 * value:.0f} %"
    return f"{value:.0f}×" if value >= 20 else f"{value:.3g}×"


def _ours(rows: Sequence[Row], kind: str, op: str | None = None) -> list[Row]:
    return [r for r in rows if r.ok and r.subject == SUBJECT and r.kind == kind and op in (None, r.op)]


def _speedup(peer: str) -> Callable[[Sequence[Row]], list[Found]]:
    def find(rows: Sequence[Row]) -> list[Found]:
        return [
            Found(1 / row.ratios[peer], row.case)
            for row in _ours(rows, "kernel", "pcgrad")
            if (row.T, row.N, row.dtype) == (8, LARGEST_WIDTH, "float32") and peer in row.ratios
        ]

    return find


def _bandwidth(op: str, layout: str) -> Callable[[Sequence[Row]], list[Found]]:
    """Of the machine's bandwidth in the same rounds: a shared machine's changes by a third within a run."""

    def find(rows: Sequence[Row]) -> list[Found]:
        return [
            Found(row.bandwidth_fraction_in_turn, row.case)
            for row in _ours(rows, "kernel", op)
            if row.bandwidth_fraction_in_turn is not None
            and (row.N, row.dtype, row.layout) == (LARGEST_WIDTH, "float32", layout)
            and (op != "gram" or (row.T or 0) <= 8)
        ]

    return find


def _against_matmul(op: str) -> Callable[[Sequence[Row]], list[Found]]:
    def find(rows: Sequence[Row]) -> list[Found]:
        return [
            Found(row.ratios["torch"], row.case)
            for row in _ours(rows, "kernel", op)
            if row.dtype == "float32" and "torch" in row.ratios
        ]

    return find


def _step(prefix: str, whole: bool) -> Callable[[Sequence[Row]], list[Found]]:
    """The whole step (forward, merge, optimizer) against one with T plain backward passes; or the merge alone."""

    def find(rows: Sequence[Row]) -> list[Found]:
        found = [
            (row.whole_ratios if whole else row.ratios, row.case)
            for row in _ours(rows, "step")
            if row.case.startswith(prefix)
        ]
        return [Found(ratios["plain"], case) for ratios, case in found if "plain" in ratios]

    return find


def _step_targets(text: str, limit: float, prefix: str) -> list[Target]:
    return [
        Target(f"{text}: training step against one with plain backwards", "<=", limit, "times", _step(prefix, True)),
        Target(f"{text}: `pc_backward` alone against plain backwards", "<=", limit, "times", _step(prefix, False)),
    ]


def _memory(rows: Sequence[Row]) -> list[Found]:
    return [Found(row.peak_ratio, row.case) for row in _ours(rows, "memory", "step") if row.peak_ratio is not None]


TARGETS = (
    Target(
        "`pcgrad(J)`, T=8, N=2²⁴ fp32: speed against TorchJD's PCGrad",
        ">=",
        5.0,
        "times",
        _speedup("torchjd"),
    ),
    Target("`pcgrad(J)`, T=8, N=2²⁴ fp32: speed against the loop", ">=", 100.0, "times", _speedup("loop")),
    Target(
        "`gram`, T ≤ 8, N=2²⁴, padded rows: of read bandwidth, in turn",
        ">=",
        0.75,
        "percent",
        _bandwidth("gram", "padded"),
    ),
    Target(
        "`gram`, T ≤ 8, N=2²⁴, contiguous rows: of read bandwidth, in turn",
        ">=",
        0.75,
        "percent",
        _bandwidth("gram", "contiguous"),
    ),
    Target(
        "`combine`, N=2²⁴, padded rows: of copy bandwidth, in turn",
        ">=",
        0.80,
        "percent",
        _bandwidth("combine", "padded"),
    ),
    Target(
        "`combine`, N=2²⁴, contiguous rows: of copy bandwidth, in turn",
        ">=",
        0.80,
        "percent",
        _bandwidth("combine", "contiguous"),
    ),
    Target("`gram`, all T and N: time against `J @ J.T`", "<=", 1.0, "times", _against_matmul("gram")),
    Target("`combine`, all T and N: time against `w @ J`", "<=", 1.0, "times", _against_matmul("combine")),
    *_step_targets("MLP, 13.7 M parameters, T=4", 1.25, "mlp T=4"),
    *_step_targets("MLP, 13.7 M parameters, T=8", 1.25, "mlp T=8"),
    *_step_targets("tutorial 10-50-1, T=2", 1.3, "tutorial"),
    Target("peak memory of a step beyond model and activations / T·N·itemsize", "<=", 1.05, "times", _memory),
)


def verdicts(rows: Sequence[Row], of: Sequence[Target] = TARGETS) -> list[Verdict]:
    judged = []
    for target in of:
        found = target.find(rows)
        pick = min if target.sense == ">=" else max
        judged.append(Verdict(target, pick(found, key=lambda f: f.value) if found else None))
    return judged
