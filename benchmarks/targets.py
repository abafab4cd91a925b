"""What the design promises, as data, each target read off the rows of one run. A loss is shown as a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.cases import LARGEST_WIDTH, PARAMETER_BYTES
from benchmarks.modes import DENSE_ROWS, FACTORED_ROWS, HOST_ROWS
from benchmarks.rows import LIBRARY, Row
from benchmarks.samples import ENGINE, GRAM, PLAIN
from benchmarks.samples import WHOLE as WHOLE_STEP
from benchmarks.steps import WHOLE

Style = Literal["times", "percent"]
Value = Callable[[Row], float | None]


@dataclass(frozen=True)
class Target:
    """``value`` of every row that has the fields ``of``; the worst counts."""

    text: str
    sense: Literal[">=", "<="]
    limit: float
    of: Mapping[str, Any]
    value: Value
    style: Style = "times"


@dataclass(frozen=True)
class Verdict:
    """``worst`` is None where nothing was measured; ``case`` gave it."""

    target: Target
    worst: float | None
    case: str = ""

    @property
    def met(self) -> bool | None:
        if self.worst is None:
            return None
        return self.worst >= self.target.limit if self.target.sense == ">=" else self.worst <= self.target.limit

    @property
    def word(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]

    @property
    def limit(self) -> str:
        return f"{'≥' if self.target.sense == '>=' else '≤'} {shown(self.target.limit, self.target.style)}"

    @property
    def value(self) -> str:
        return "–" if self.worst is None else shown(self.worst, self.target.style)


def shown(value: float, style: Style) -> str:
    if style == "percent":
        return f"{100 * value:.0f} %"
    return f"{value:.0f}×" if value >= 20 else f"{value:.3g}×"


def verdicts(rows: Sequence[Row], of: Sequence[Target]) -> list[Verdict]:
    judged = []
    for target in of:
        chosen = [row for row in rows if row.ok and all(getattr(row, name) == at for name, at in target.of.items())]
        found = [(value, row.case) for row in chosen if (value := target.value(row)) is not None]
        pick = min if target.sense == ">=" else max
        judged.append(Verdict(target, *pick(found)) if found else Verdict(target, None))
    return judged


def _rows(kind: str, op: str, subject: str = LIBRARY, **fields: Any) -> Mapping[str, Any]:
    return {"kind": kind, "op": op, "subject": subject, **fields}


def _speed(peer: str) -> Value:
    return lambda row: 1 / row.ratios[peer] if peer in row.ratios else None


def _pcgrad(peer: str, name: str, limit: float) -> Target:
    of = _rows("kernel", "pcgrad", T=8, N=LARGEST_WIDTH, dtype="float32")
    return Target(f"`pcgrad(J)`, T=8, N=2²⁴ fp32: speed against {name}", ">=", limit, of, _speed(peer))


def _bandwidth(op: str, layout: str, tasks: str, way: str, limit: float) -> Target:
    """Of the machine's bandwidth in the same rounds: a shared machine's changes by a third within a run."""
    text = f"`{op}`, {tasks}N=2²⁴, {layout} rows: of {way} bandwidth, in turn"
    of = _rows("kernel", op, N=LARGEST_WIDTH, dtype="float32", layout=layout)

    def value(row: Row) -> float | None:
        return row.bandwidth_fraction_in_turn if not tasks or (row.T or 0) <= 8 else None

    return Target(text, ">=", limit, of, value, "percent")


def _matmul(op: str, product: str) -> Target:
    of = _rows("kernel", op, dtype="float32")
    return Target(f"`{op}`, all T and N: time against `{product}`", "<=", 1.0, of, lambda row: row.ratios.get("torch"))


def _steps(text: str, limit: float, case: str) -> tuple[Target, Target]:
    """The whole step (forward, merge, optimizer) against one with T plain backward passes; and the merge alone."""
    whole, alone = "training step against one with plain backwards", "`pc_backward` alone against plain backwards"
    of = _rows("step", "step", case=case)
    return (
        Target(f"{text}: {whole}", "<=", limit, of, lambda row: row.whole_ratios.get("plain")),
        Target(f"{text}: {alone}", "<=", limit, of, lambda row: row.ratios.get("plain")),
    )


def _large(text: str, limit: float, kind: str, mode: str, value: Value, style: Style = "times") -> Target:
    return Target(text, "<=", limit, _rows(kind, "large", mode), value, style)


def _peak(row: Row) -> float | None:
    return row.peak_ratio


def _in_gradients(row: Row) -> float | None:
    """The peak in units of one gradient, N·itemsize."""
    return None if row.peak_bytes is None or not row.N else row.peak_bytes / (row.N * PARAMETER_BYTES)


_BEYOND = "beyond model and activations / T·N·itemsize"
CPU = (
    _pcgrad("torchjd", "TorchJD's PCGrad", 5.0),
    _pcgrad("loop", "the loop", 100.0),
    _bandwidth("gram", "padded", "T ≤ 8, ", "read", 0.75),
    _bandwidth("gram", "contiguous", "T ≤ 8, ", "read", 0.75),
    _bandwidth("combine", "padded", "", "copy", 0.80),
    _bandwidth("combine", "contiguous", "", "copy", 0.80),
    _matmul("gram", "J @ J.T"),
    _matmul("combine", "w @ J"),
    *_steps("MLP, 13.7 M parameters, T=4", 1.25, "mlp T=4"),
    *_steps("MLP, 13.7 M parameters, T=8", 1.25, "mlp T=8"),
    *_steps("tutorial 10-50-1, T=2", 1.3, "tutorial T=2"),
    Target(f"peak memory of a step {_BEYOND}", "<=", 1.05, _rows("memory", "step"), _peak),
)
STREAMING_STEP, STREAMING_PEAK = 1.10, 1.05
_PASSES, _SHARE = "whole step against T plain forward and backward passes", "`merge()` as a share of the step"
LARGE = (
    _large(f"streaming: {_PASSES}", STREAMING_STEP, "step", "streaming", lambda row: row.whole_ratios.get("plain")),
    _large(f"streaming: {_SHARE}", 0.05, "step", "streaming", lambda row: row.ratios.get(WHOLE), "percent"),
    _large(f"streaming: peak {_BEYOND}", STREAMING_PEAK, "memory", "streaming", _peak),
    _large("streaming, bf16 rows: peak / T·N·itemsize of fp32", 0.55 * 1.05, "memory", "streaming[bf16 rows]", _peak),
    _large("two_phase: peak / N·itemsize, at any T", 2.1, "memory", "two_phase", _in_gradients),
)
_ON_DEVICE = "streaming, rows in host memory: peak on the device / N·itemsize"
GPU = (*LARGE, _large(_ON_DEVICE, 2.1, "memory", HOST_ROWS, _in_gradients))


def _factored(case: str, limit: float, floor: str = "plain", by: str = "T plain backwards") -> Target:
    text = f"`pc_backward`, {case}: time against {by}"
    return Target(text, "<=", limit, _rows("step", "factored", case=case), lambda row: row.ratios.get(floor))


def _like_dense(case: str) -> Target:
    return _factored(case, 1.03, DENSE_ROWS, 'that with `rows="dense"`')


FACTORED = (
    _factored("mlp T=8 B=4", 0.32),
    _factored("mlp T=8 B=32", 0.55),
    _factored("mlp T=4 B=32", 0.65),
    _factored("mlp T=4 B=256", 0.95),
    *map(_like_dense, ("mlp 0.94M T=4 B=32", "mlp 0.17M T=8 B=32", "wide transformer T=4 B=8 x 64 tokens")),
    Target("factored rows: peak / N·itemsize", "<=", 1.5, _rows("memory", "factored", FACTORED_ROWS), _in_gradients),
)
_SPARSE = "`pc_backward`, a sparse table of 300 k rows, T=4: time against T plain backwards"
FLOOR = (
    Target(
        "one loss a sample, G: speed against TorchJD's Engine", ">=", 30, _rows("step", "samples", GRAM), _speed(ENGINE)
    ),
    Target(
        "one loss a sample, whole step with PCGrad: time against a plain one",
        "<=",
        2.5,
        _rows("step", "samples", WHOLE_STEP),
        lambda row: row.whole_ratios.get(PLAIN),
    ),
    Target(
        _SPARSE,
        "<=",
        1.6,
        _rows("step", "floor", case="recommender V=300000 T=4 B=512"),
        lambda row: row.ratios.get(PLAIN),
    ),
)
_DOUBLE = "double backward"
GRADNORM = (
    Target(f"GradNorm's step: speed against the {_DOUBLE}", ">=", 1.5, _rows("step", "gradnorm"), _speed(_DOUBLE)),
)
