"""Every method on a GPU against TorchJD's: the whole aggregation of a packed fp32 J of N = 2²².

As ``benchmarks.methods`` does it on a CPU. A method whose weights are found on the host waits for the GPU, and so do
most of TorchJD's; the events around a call hold that wait.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from benchmarks import method_cases, rows
from benchmarks.gpu_timing import DEVICE, timed
from benchmarks.rows import Environment, Row
from benchmarks.subjects import LIBRARY, MISSING, library_backend

WIDTH = 1 << 22
Make = Callable[[str, Tensor], Callable[[], object]]


class Run(Protocol):
    """What is needed of ``benchmarks.gpu.Run``."""

    environment: Environment

    @property
    def late(self) -> bool: ...
    def add(self, row: Row) -> Row: ...


def measure(run: Run) -> None:
    """Rows of both for each method and T; a ratio is TorchJD / library, so above 1 the library is faster."""
    for tasks in method_cases.TASKS:
        grads = method_cases.task_gradients(tasks, WIDTH).to(DEVICE)
        for name in method_cases.names(tasks):
            if run.late:
                print("the time was up", flush=True)
                return
            own = run.add(_timed(run, name, grads, LIBRARY, _library_call))
            their = _timed(run, name, grads, method_cases.PEER, _peer_call)
            if own.p50_ms and their.p50_ms:
                their = dataclasses.replace(their, ratios={LIBRARY: their.p50_ms / own.p50_ms})
            run.add(their)


def summary(measured: list[Row]) -> Iterator[str]:
    """A line for each method and T with both times, and how many are five times as fast."""
    found = [row for row in measured if row.kind == "method" and row.ratios]
    own = {(row.op, row.T): row.p50_ms for row in measured if row.kind == "method" and row.subject == LIBRARY}
    for row in found:
        yield f"{row.case}: {own[row.op, row.T]:.3f} ms, TorchJD {row.p50_ms:.3f} ms, {row.ratios[LIBRARY]:.3g} times"
    if found:
        factors = [row.ratios[LIBRARY] for row in found]
        slower, five = sum(factor < 1 for factor in factors), sum(factor >= 5 for factor in factors)
        yield f"methods: {slower} of {len(found)} slower than TorchJD, {five} at least 5 times as fast"


def _library_call(name: str, grads: Tensor) -> Callable[[], object]:
    method = method_cases.ours(name, len(grads))
    return lambda: method_cases.aggregate(method, grads)


def _peer_call(name: str, grads: Tensor) -> Callable[[], object]:
    aggregator = method_cases.theirs(name, len(grads), grads.dtype, grads.device)
    return lambda: aggregator(grads)


def _timed(run: Run, name: str, grads: Tensor, subject: str, make: Make) -> Row:
    tasks, width = grads.shape
    row = Row(
        "method",
        f"{name} aggregation T={tasks} N={width}",
        f"{name}.aggregation",
        subject,
        run.environment,
        subject_version=rows.version_of(subject),
        backend=library_backend(DEVICE) if subject == LIBRARY else "torch",
        T=tasks,
        N=width,
        dtype="float32",
    )
    try:
        timing = timed(make(name, grads))
    except (ImportError, AttributeError) as problem:
        return dataclasses.replace(row, status=MISSING + str(problem).partition("\n")[0])
    except Exception as error:
        return dataclasses.replace(row, status=rows.failed(error))
    return dataclasses.replace(row, rounds=timing.rounds, p20_ms=timing.p20, p50_ms=timing.p50, p80_ms=timing.p80)
