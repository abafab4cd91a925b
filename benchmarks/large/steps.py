"""Whole training steps in turn: forward and backward passes, merge, SGD.

``whole_p50_ms`` is of the whole step, ``whole_ratios`` against the other modes in the same rounds. Where the mode calls
``GradientSurgery.merge()`` by itself, ``p50_ms`` is of that call, and ``ratios["whole step"]`` its share of the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks import check
from benchmarks.large import models
from benchmarks.large.cases import PARAMETER_BYTES, SMALL, Batch, Case
from benchmarks.large.modes import WHOLE, Mode, modes, step_phases
from benchmarks.measure import Plan, Samples, Subject, in_turn, paired_ratio, percentile, total
from benchmarks.memory import available_bytes
from benchmarks.rows import SKIPPED_LATE, Environment, Row, version_of
from fastpcgrad import reference

FITS = 0.85
"""Of the available memory: all modes of a case lie there at a time."""


def rows(case: Case, environment: Environment, plan: Plan, late: Callable[[], bool]) -> list[Row]:
    """A row a mode: its times, or why there are none."""
    chosen = [mode for mode in modes() if mode.is_affordable(case.size)]
    refused: dict[str, str] = {}
    left = FITS * available_bytes()
    for mode in chosen:
        needed = (PARAMETER_BYTES + mode.beyond(case.tasks)) * case.size.parameters
        refused[mode.name] = SKIPPED_LATE if late() else _objection(mode)
        if not refused[mode.name] and needed > left:
            refused[mode.name] = f"skipped: memory ({needed / 2**30:.0f} GiB predicted, {left / 2**30:.0f} GiB left)"
        if not refused[mode.name]:
            left -= needed
    competitors = [
        Subject(mode.name, step_phases(mode, models.build(case.size, case.tasks, case.size.batch)))
        for mode in chosen
        if not refused[mode.name]
    ]
    samples = in_turn(competitors, plan)
    wholes = {name: total(phases.values()) for name, phases in samples.items()}
    found, width = [], width_of(case)
    for mode in chosen:
        row = untimed(case, width, environment, mode, refused[mode.name])
        found.append(with_times(row, wholes, samples[mode.name].get("merge")) if row.ok else row)
    return found


def with_times(row: Row, wholes: dict[str, Samples], merge: Samples | None) -> Row:
    """The row with its whole step beside those of the other modes, and with ``merge`` where it runs by itself."""
    own = wholes[row.subject]
    if merge is not None:
        p20, p50, p80 = (percentile(merge.values, p) for p in (20, 50, 80))
        share = paired_ratio(merge, own)
        row = dataclasses.replace(row, p20_ms=p20, p50_ms=p50, p80_ms=p80, ratios={WHOLE: share})
    return dataclasses.replace(
        row,
        rounds=own.rounds,
        cold=own.cold,
        whole_p50_ms=percentile(own.values, 50),
        whole_ratios={name: paired_ratio(own, other) for name, other in wholes.items() if name != row.subject},
    )


def width_of(case: Case, device: str = "meta") -> int:
    """N, of a model that is made there."""
    return sum(p.numel() for p in models.build(case.size, case.tasks, case.size.batch, device).parameters())


def untimed(case: Case, width: int, environment: Environment, mode: Mode, status: str) -> Row:
    """A row without numbers; empty ``status``: they will come."""
    return Row(
        kind="step",
        case=case.label,
        op="large",
        subject=mode.name,
        environment=environment,
        subject_version=environment.fastpcgrad if mode.ours else version_of(mode.name),
        status=status or "ok",
        T=case.tasks,
        N=width,
        dtype="float32",
        note=f"whole step, batch {case.size.batch}",
    )


def _objection(mode: Mode) -> str:
    """Why a mode gets no numbers: ours may be off the float64 oracle on a tiny model; empty where it is right."""
    if isinstance(mode.build, str):
        return mode.build
    if not mode.ours:
        return ""  # the peers are checked where they are compared with each other: benchmarks.run
    error = error_of(mode)
    tolerance = check.TOLERANCE["bfloat16" if "bf16" in mode.name else "float32"]
    return "" if error <= tolerance else f"wrong: {error / tolerance:.3g} times the tolerance off the float64 oracle"


def error_of(mode: Mode, tasks: int = 3) -> float:
    """‖m − m₆₄‖ / Σ_j ‖g_j‖, no less than the project's measure: w_j ≥ 1 for the paper's PCGrad."""
    model, oracle = (models.build(SMALL, tasks, Batch(2, 8)) for _ in range(2))
    check.seed(11)
    for phase, call in step_phases(mode, model).items():
        if phase != "step":
            call()
    gradients = check.task_gradients(oracle.double())
    check.seed(11)
    expected = reference.merge(gradients, oracle.parameters_list(), "paper")
    error, scale = 0.0, 0.0
    for p, e in zip(model.parameters_list(), expected, strict=True):
        assert p.grad is not None and e is not None
        error += float((p.grad.double() - e).square().sum())
    for row in gradients:
        scale += sum(float(g.square().sum()) for g in row if g is not None) ** 0.5
    return error**0.5 / scale
