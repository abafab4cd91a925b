"""Peak memory of one mode's step in a fresh process; the definitions are those of ``benchmarks.memory``.

*Model and activations* is what one forward and one backward of a task need beside the gradients which that leaves, of
the task's own forward or of the one that all share, as the mode has it. The batch is small: activations are no part of
the figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch

from benchmarks import memory
from benchmarks.large import cases, models
from benchmarks.large.cases import MEMORY_BATCH, PARAMETER_BYTES, SMALL, Case, Size
from benchmarks.large.modes import Mode, mode_named, modes, step_phases
from benchmarks.memory import ACTIVATIONS, NOTE, STEPS, Measured, Peak, available_bytes, watch
from benchmarks.models import clear_gradients
from benchmarks.rows import SKIPPED_LATE, Environment, Row

FITS = 0.8
"""Of the available memory: more is not asked for."""
SIDE_BY_SIDE = 200e6
"""Parameters up to which two processes run at a time."""


def rows(size: Size, tasks: Iterable[int], environment: Environment, late: Callable[[], bool]) -> list[Row]:
    """A row for each number of tasks and each mode: its peak, or why there is none."""
    chosen = [mode for mode in modes() if mode.is_affordable(size) and size.parameters <= mode.measured_up_to]
    jobs = [(Case(size, count), mode) for count in tasks for mode in chosen]
    refused = [_refusal(case, mode) for case, mode in jobs]

    def run(case: Case, mode: Mode, only: str = "") -> Measured:
        return Measured(error=SKIPPED_LATE) if late() else _in_fresh_process(case, mode, environment.threads, only)

    with ThreadPoolExecutor(2 if size.parameters < SIDE_BY_SIDE else 1) as pool:
        # Of each kind of graph one: the heads, of which there are as many as tasks, weigh nothing.
        graphs = {mode.graph: (case, mode) for (case, mode), why in zip(jobs, refused, strict=True) if not why}
        common = {graph: pool.submit(run, *job, ACTIVATIONS) for graph, job in graphs.items()}
        peaks = [None if why else pool.submit(run, *job) for job, why in zip(jobs, refused, strict=True)]
        return [
            without_peak(case, environment, mode, why)
            if peak is None
            else with_peak(without_peak(case, environment, mode), common[mode.graph].result(), peak.result())
            for (case, mode), why, peak in zip(jobs, refused, peaks, strict=True)
        ]


def _refusal(case: Case, mode: Mode) -> str:
    """Why a mode is not run; empty where it is."""
    if isinstance(mode.build, str):
        return mode.build
    needed = (PARAMETER_BYTES + mode.beyond(case.tasks)) * case.size.parameters
    if needed > FITS * available_bytes():
        return f"skipped: memory ({needed / 2**30:.0f} GiB predicted, {available_bytes() / 2**30:.0f} GiB available)"
    return ""


def without_peak(case: Case, environment: Environment, mode: Mode, status: str = "", how: str = NOTE) -> Row:
    """A row without numbers; empty ``status``: they will come. ``how`` they are measured."""
    return Row(
        kind="memory",
        case=case.label,
        op="large",
        subject=mode.name,
        environment=environment,
        status=status or "ok",
        T=case.tasks,
        dtype="float32",
        note=f"{how}, batch {MEMORY_BATCH}",
    )


def with_peak(row: Row, common: Measured, found: Measured) -> Row:
    """The row with what ``found`` has beyond model and activations, which ``common`` is; or with an error of either."""
    if error := common.error or found.error:
        return dataclasses.replace(row, status=error)
    beyond = found.peak - (common.peak - common.gradients)
    ratio = beyond / ((row.T or 1) * found.width * PARAMETER_BYTES)
    return dataclasses.replace(row, N=found.width, peak_bytes=beyond, peak_ratio=ratio)


def _in_fresh_process(case: Case, mode: Mode, threads: int, only: str) -> Measured:
    what = ["--only", only] if only else []
    return memory.fresh_process("benchmarks.large.memory", case.label, mode.name, "--threads", str(threads), *what)


def peak(
    case: Case,
    mode: Mode,
    activations: bool,
    device: str = "cpu",
    watching: Callable[[], AbstractContextManager[Peak]] = watch,
) -> Measured:
    """In this process: bytes above the base by ``watching``, the gradients of one plain backward, and N."""
    small = models.build(SMALL, case.tasks, MEMORY_BATCH, device)
    for call in step_phases(mode, small).values():
        call()

    model = models.build(case.size, case.tasks, MEMORY_BATCH, device)
    parameters = model.parameters_list()
    model.loss(0).backward()
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    clear_gradients(parameters)
    with watching() as found:
        if activations:
            loss = model.loss(0) if mode.graph == "own" else model().losses[0]
            loss.backward(retain_graph=True)
        else:
            phases = step_phases(mode, model)
            for _ in range(STEPS):
                clear_gradients(parameters)
                for call in phases.values():
                    call()
    return Measured(found.bytes, gradients, sum(p.numel() for p in parameters))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one mode in this process; answers one JSON line.")
    parser.add_argument("case")
    parser.add_argument("mode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=[ACTIVATIONS])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = next(case for case in cases.memory_cases(quick=False) if case.label == options.case)
    print(json.dumps(dataclasses.asdict(peak(case, mode_named(options.mode), options.only == ACTIVATIONS))))


if __name__ == "__main__":
    main()
