"""Whole training steps in turn: forward and backward passes, merge, SGD.

Every subject has its own equal model. ``whole_p50_ms`` is of the whole step, ``whole_ratios`` against the others in the
same rounds. ``p50_ms`` is of a phase of it:

- *step*: T backward passes and surgery on given losses, after gradients were set to None: for ``plain`` T times
  (gradients to None, ``loss.backward(retain_graph=not last)``), for the others the call that ends with the merged
  gradient in ``.grad``, their own T backward passes included. ``ratios`` are of this phase.
- *factored*: the same of the library's ways to keep rows; the first steps of each are not among those that are timed.
- *large*: ``GradientSurgery.merge()`` where the mode calls it by itself; ``ratios["whole step"]`` is its share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch

from benchmarks import check, models
from benchmarks.cases import PARAMETER_BYTES, Gpt, StepCase
from benchmarks.memory import available_bytes
from benchmarks.models import width_of
from benchmarks.modes import BACKWARDS, MERGE, Mode, modes
from benchmarks.rows import SKIPPED_LATE, Row
from benchmarks.session import Run
from benchmarks.timing import Clock, Phases, Plan, Samples, Times, in_turn, paired_ratio, ratios, total, with_times

WHOLE = "whole step"
"""What the time of ``merge`` is a share of, among the ratios of a row."""
FITS = 0.85
"""Of the available memory: all modes of a case lie there at a time."""
ON_GPU = Plan(0.0, least=8, most=8, slow=float("inf"), cold=float("inf"))


def plan_of(case: StepCase, quick: bool) -> Plan:
    if isinstance(case.model, Gpt):
        long = Plan(1.5, least=5, most=40, slow=1.0, slow_least=3, cold=60.0)
        return Plan(1.0, least=3, most=5, cold=60.0) if quick else long
    # The small model's step takes a fraction of a millisecond and needs many rounds.
    most = 2000 if case.model == "tutorial" else 40
    return Plan(1.0 if quick else 3.0, least=11, most=most, slow=1.0, slow_least=2, cold=15.0)


def measure(run: Run, of: Iterable[StepCase]) -> None:
    for case in of:
        run.starts(f"steps of {case.label}")
        run.add(rows(run, case, plan_of(case, run.quick)))


def rows(run: Run, case: StepCase, plan: Plan) -> list[Row]:
    """A row a mode: its times, or why there are none."""
    chosen = [mode for mode in modes(case) if mode.timed and case.parameters <= mode.up_to]
    refused: dict[str, str] = {}
    left = FITS * available_bytes()
    for mode in chosen:
        needed = (PARAMETER_BYTES + mode.beyond(case.tasks)) * case.parameters
        refused[mode.name] = _refusal(run, case, mode)
        if not refused[mode.name] and needed > left:
            refused[mode.name] = f"skipped: memory ({needed / 2**30:.0f} GiB predicted, {left / 2**30:.0f} GiB left)"
        if not refused[mode.name]:
            left -= needed
    return timed(run, case, chosen, refused, plan)


def rows_on_gpu(run: Run, case: StepCase, of: Iterable[Mode]) -> list[Row]:
    """The same with TF32 products; what cannot run fails when it is made."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = timed(run, case, list(of), {}, ON_GPU)
    finally:
        torch.set_float32_matmul_precision(precision)
    return [dataclasses.replace(row, note=f"{row.note}, TF32 products") for row in found]


def _refusal(run: Run, case: StepCase, mode: Mode) -> str:
    """Why a mode gets no numbers; empty where it is right."""
    if isinstance(mode.build, str):
        return mode.build
    return SKIPPED_LATE if run.late else check.objection(functools.partial(check.step_error, mode, case))


def timed(run: Run, case: StepCase, chosen: list[Mode], refused: dict[str, str], plan: Plan) -> list[Row]:
    def phases_of(mode: Mode) -> Phases:
        return mode.phases(models.build(case, run.device))

    builders = {m.name: functools.partial(phases_of, m) for m in chosen if not refused.get(m.name)}
    times, failures = in_turn(builders, plan, run.device)
    width, how = width_of(case), "merge: T backwards and surgery on given losses"
    if case.op == "large":
        how = f"whole step, batch {case.batch}"
    found = []
    for mode in chosen:
        row = run.row(
            "step", case.label, case.op, mode.name, T=case.tasks, N=width, subject_version=mode.version,
            backend=mode.backend(run.device), status=(refused | failures).get(mode.name) or "ok",
            note=", ".join(filter(None, (how, Clock.note))),
        )  # fmt: skip
        found.append(with_numbers(row, times) if row.ok else row)
    return found


def with_numbers(row: Row, times: Times) -> Row:
    """The row with the times of its subject's phases, and their ratios to those of the others."""
    wholes = {name: total(phases.values()) for name, phases in times.items()}
    own = wholes[row.subject]
    if row.op != "large":
        merges: dict[str, Samples] = {name: phases[BACKWARDS] for name, phases in times.items()}
        row = dataclasses.replace(with_times(row, merges[row.subject]), ratios=ratios(row.subject, merges))
    elif MERGE in times[row.subject]:
        merge = times[row.subject][MERGE]
        row = dataclasses.replace(with_times(row, merge), ratios={WHOLE: paired_ratio(merge, own)})
    return dataclasses.replace(
        row, rounds=own.rounds, cold=own.cold, whole_p50_ms=own.median, whole_ratios=ratios(row.subject, wholes)
    )
