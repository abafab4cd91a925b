"""Weights of up to a thousand tasks, one loss a sample: G of gradients that are correlated and depend on each other.

J ``[T, 49]`` has the gradients of a small network's losses of single samples, so that G has at most rank 49. Each
method solves for weights, the library and TorchJD from their own G of the same float64 J; they take turns.
What is predicted to take TorchJD more than ``ONE_CALL`` seconds is skipped. Of the largest T the peak of memory beyond
G is that of a fresh process.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import memory, method_cases
from benchmarks.method_cases import PEER
from benchmarks.rows import LIBRARY, ROOT, SKIPPED_BUDGET, SKIPPED_LATE, Row, missing, version_of
from benchmarks.session import Run
from benchmarks.tables import markdown, origin
from benchmarks.timing import Call, Clock, Phases, Plan, Samples, in_turn, ratios, with_times
from fastpcgrad import methods
from fastpcgrad.methods.elementwise import Elementwise
from fastpcgrad.methods.fixed_weights import FixedWeights

TASKS, QUICK_TASKS = (64, 256, 1024), (8, 32)
ONE_CALL = 20.0
OP, SOLVE = "many", "solve"
PLAN, QUICK = Plan(1.0, cold=4.0), Plan(0.0, least=1, most=1)


class Case(NamedTuple):
    """A method, by its name in ``fastpcgrad.methods``, and a number of tasks."""

    method: str
    tasks: int

    @property
    def label(self) -> str:
        return f"{self.method} weights T={self.tasks}, rank 49"


def cases(quick: bool) -> Iterator[Case]:
    """Of each method that makes weights of G and has a counterpart, ascending in T."""
    for name in method_cases.names():
        kind = getattr(methods, name)
        if name != "CRMOGM" and not issubclass(kind, (Elementwise, FixedWeights)):
            yield from (Case(name, tasks) for tasks in (QUICK_TASKS if quick else TASKS))


def sample_gradients(tasks: int) -> Tensor:
    """J ``[T, 49]``, float64."""
    torch.manual_seed(tasks)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    inputs = torch.randn(tasks, 4).double()
    errors = net(inputs)[:, 0] - inputs.sum(dim=1).sin() - 0.3 * torch.randn(tasks)
    each = torch.autograd.grad(
        errors.square(), list(net.parameters()), torch.eye(tasks).double(), is_grads_batched=True
    )
    return torch.cat([own.flatten(1) for own in each], dim=1)


def measure(run: Run) -> None:
    seconds: dict[str, float] = {}
    for case in cases(run.quick):
        run.starts(case.label)
        run.add(rows(run, case, seconds))


def rows(run: Run, case: Case, seconds: dict[str, float]) -> list[Row]:
    """The library's and TorchJD's. ``seconds``: of each method TorchJD's for 64 tasks, as T³ predicts; filled here."""
    grads = sample_gradients(case.tasks)
    makers = {LIBRARY: method_cases.library_call, PEER: method_cases.peer_call}
    refused = dict.fromkeys(makers, SKIPPED_LATE if run.late else "")
    expected = seconds.get(case.method, 0.0) * (case.tasks / TASKS[0]) ** 3
    if expected > ONE_CALL:
        refused[PEER] = f"{SKIPPED_BUDGET} (one call: {expected:.0f} s predicted, {ONE_CALL:.0f} s allowed)"
    calls: dict[str, Call] = {}
    for name, make in makers.items():
        try:
            calls |= {} if refused[name] else {name: make(case.method, "weights", grads)}
        except (ImportError, AttributeError) as error:
            refused[name] = missing(error)
    times, failures = in_turn({name: _phases(call) for name, call in calls.items()}, QUICK if run.quick else PLAN)
    solves = {name: found[SOLVE] for name, found in times.items()}
    if PEER in solves:
        seconds[case.method] = solves[PEER].median / 1e3 * (TASKS[0] / case.tasks) ** 3
    return [_row(run, case, name, (refused | failures)[name] or "ok", solves) for name in makers]


def _phases(call: Call) -> Callable[[], Phases]:
    return lambda: {SOLVE: call}


def _row(run: Run, case: Case, name: str, status: str, solves: dict[str, Samples]) -> Row:
    row = run.row(
        "method",
        case.label,
        OP,
        name,
        subject_version=version_of(name),
        T=case.tasks,
        N=49,
        status=status,
        note=Clock.note,
    )
    if not row.ok:
        return row
    row = dataclasses.replace(with_times(row, solves[name]), ratios=ratios(name, solves))
    if name == LIBRARY and case.tasks == TASKS[-1]:
        peak = peak_of(case)
        row = dataclasses.replace(row, peak_bytes=peak, peak_ratio=peak / (8 * case.tasks**2))
    return row


def peak_of(case: Case) -> int:
    """Bytes beyond G, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.many_tasks", case.method, str(case.tasks)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | memory.MALLOC, check=True, capture_output=True, text=True
    )  # fmt: skip
    return int(done.stdout)


def table(latest: Sequence[Row]) -> str:
    """A line a method; TorchJD's time as a multiple. Nothing where there are no rows."""
    if not latest:
        return "Not yet measured."
    counts = sorted({row.T for row in latest if row.T})
    found = {(row.case.partition(" ")[0], row.T, row.subject): row for row in latest}
    lines = []
    for name in sorted({name for name, _, _ in found}):
        cells = [_cell(*(found.get((name, count, subject)) for subject in (LIBRARY, PEER))) for count in counts]
        peaks = (found[name, count, LIBRARY].peak_ratio for count in counts if (name, count, LIBRARY) in found)
        lines.append([f"`{name}`", *cells, *(f"{peak:.1f}" for peak in peaks if peak is not None)])
    header = ("method", *(f"ms, T={count:,}" for count in counts), f"peak, T={counts[-1]:,}, by 8 T² bytes")
    how = " CPU time, on a machine that others use." if any(row.note for row in latest) else ""
    return f"{markdown(header, lines)}\n\n{origin(latest)}{how}"


def _cell(own: Row | None, their: Row | None) -> str:
    if own is None or own.p50_ms is None:
        return "" if own is None else own.status
    value = _digits(own.p50_ms)
    if their is not None and their.status.startswith(SKIPPED_BUDGET):
        return f"{value} (–)"
    return f"{value} ({_digits(1 / own.ratios[PEER])}×)" if PEER in own.ratios else value


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _print_peak(name: str, tasks: int) -> None:
    method_cases.library_call(name, "weights", sample_gradients(8))()  # loads what is loaded at first use
    call = method_cases.library_call(name, "weights", sample_gradients(tasks))
    with memory.watch() as peak:
        call()
    print(peak.bytes)


if __name__ == "__main__":
    _print_peak(sys.argv[1], int(sys.argv[2]))
