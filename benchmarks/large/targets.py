"""What the library promises for large models, each read off the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.large.cases import PARAMETER_BYTES
from benchmarks.large.modes import WHOLE
from benchmarks.rows import Row
from benchmarks.targets import Found, Target


def of(kind: str, subject: str, value: Callable[[Row], float | None]) -> Callable[[Sequence[Row]], list[Found]]:
    """Finds ``value`` of every row of one mode."""

    def find(rows: Sequence[Row]) -> list[Found]:
        chosen = [row for row in rows if (row.kind, row.op, row.subject) == (kind, "large", subject) and row.ok]
        found = [(value(row), row.case) for row in chosen]
        return [Found(number, case) for number, case in found if number is not None]

    return find


def gradients(row: Row) -> float | None:
    """The peak in units of one gradient, N·itemsize."""
    return None if row.peak_bytes is None or not row.N else row.peak_bytes / (row.N * PARAMETER_BYTES)


TARGETS = (
    Target(
        "streaming: whole step against T plain forward and backward passes",
        "<=",
        1.10,
        "times",
        of("step", "streaming", lambda row: row.whole_ratios.get("plain")),
    ),
    Target(
        "streaming: `merge()` as a share of the step",
        "<=",
        0.05,
        "percent",
        of("step", "streaming", lambda row: row.ratios.get(WHOLE)),
    ),
    Target(
        "streaming: peak beyond model and activations / T·N·itemsize",
        "<=",
        1.05,
        "times",
        of("memory", "streaming", lambda row: row.peak_ratio),
    ),
    Target(
        "streaming, bf16 rows: peak / T·N·itemsize of fp32",
        "<=",
        0.55 * 1.05,
        "times",
        of("memory", "streaming[bf16 rows]", lambda row: row.peak_ratio),
    ),
    Target("two_phase: peak / N·itemsize, at any T", "<=", 2.1, "times", of("memory", "two_phase", gradients)),
)
