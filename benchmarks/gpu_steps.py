"""Training steps of a large model on a GPU, in each of the library's modes: peak memory and time.

A GPT-style transformer of 98 M parameters with T=4 tasks. Peaks are those of ``benchmarks.large.memory``, with what
torch's allocator has given out on the GPU in place of the process's memory. Times are of whole steps as in
``benchmarks.large.steps``, with TF32 products; they are events in the stream, so that the host runs ahead of the GPU
as it does in training.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from benchmarks import memory, rows
from benchmarks.gpu_timing import DEVICE, event, synchronize
from benchmarks.large import models, steps, targets
from benchmarks.large.cases import Batch, Case, Size
from benchmarks.large.memory import peak, with_peak, without_peak
from benchmarks.large.modes import Mode, Phases, mode_named, step_phases, streaming
from benchmarks.measure import Samples, total
from benchmarks.memory import STEPS, Measured, Peak
from benchmarks.rows import Environment, Row
from benchmarks.targets import Target
from fastpcgrad import backends

CASE = Case(Size("100M", 16384, 768, 12, context=512, batch=Batch(8, 512)), 4)
ROUNDS, WARM_UP = 8, 2
HOST_ROWS = "streaming[host rows]"
TARGETS = (
    *targets.TARGETS,
    Target(
        "streaming, rows in host memory: peak on the device / N·itemsize",
        "<=",
        2.1,
        "times",
        targets.of("memory", HOST_ROWS, targets.gradients),
    ),
)


def modes() -> tuple[Mode, ...]:
    names = ("plain", "plain[shared graph]", "streaming", "streaming[bf16 rows]", "pc_backward", "two_phase")
    on_host = functools.partial(streaming, row_device="cpu")
    return (*map(mode_named, names), Mode(HOST_ROWS, "own", lambda tasks: 8, on_host, ours=True))


@contextmanager
def watch() -> Iterator[Peak]:
    """``benchmarks.memory.watch`` on the GPU. What another stream still copies counts until that is done."""
    gc.collect()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_stats()["active_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    found = Peak()
    yield found
    synchronize()
    found.bytes = torch.cuda.memory_stats()["active_bytes.all.peak"] - base


def memory_rows(case: Case, environment: Environment, chosen: Iterable[Mode]) -> list[Row]:
    """A row a mode: its peak beyond model and activations, or why there is none."""
    activations: dict[str, Measured] = {}
    found = []
    for mode in chosen:
        row = without_peak(case, environment, mode, how=f"{STEPS} steps")
        if mode.graph not in activations:
            activations[mode.graph] = _peak(case, mode, activations=True)
        found.append(_by(mode, with_peak(row, activations[mode.graph], _peak(case, mode, activations=False))))
    return found


def step_rows(case: Case, environment: Environment, chosen: Iterable[Mode]) -> list[Row]:
    """A row a mode: its times in turn with the others, or why there are none."""
    chosen, precision = list(chosen), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    gc.disable()
    try:
        refused, samples = _in_turn(case, chosen)
    finally:
        gc.enable()
        torch.set_float32_matmul_precision(precision)
    wholes = {name: total(phases.values()) for name, phases in samples.items()}
    found, width = [], steps.width_of(case, DEVICE)
    for mode in chosen:
        row = steps.untimed(case, width, environment, mode, refused.get(mode.name, ""))
        row = dataclasses.replace(row, note=f"{row.note}, TF32 products")
        found.append(_by(mode, steps.with_times(row, wholes, samples[mode.name].get("merge")) if row.ok else row))
    return found


def _peak(case: Case, mode: Mode, activations: bool) -> Measured:
    try:
        return peak(case, mode, activations, DEVICE, watch if DEVICE == "cuda" else memory.watch)
    except Exception as error:
        return Measured(error=rows.failed(error))


def _in_turn(case: Case, chosen: Iterable[Mode]) -> tuple[dict[str, str], dict[str, dict[str, Samples]]]:
    """Why modes cannot run, and the times of the others, by mode and phase."""
    refused: dict[str, str] = {}
    ready: dict[str, Phases] = {}
    for mode in chosen:
        try:
            phases = step_phases(mode, models.build(case.size, case.tasks, case.size.batch, DEVICE))
            for _ in range(WARM_UP):
                _milliseconds(phases)
        except Exception as error:
            refused[mode.name] = rows.failed(error)
        else:
            ready[mode.name] = phases
    samples = {name: {phase: Samples() for phase in phases} for name, phases in ready.items()}
    for index in range(ROUNDS):
        gc.collect()  # else a cycle would keep a step's activations
        for name in random.sample(list(ready), len(ready)):
            for phase, value in _milliseconds(ready[name]).items():
                samples[name][phase].by_round[index] = value
    return refused, samples


def _milliseconds(phases: Phases) -> dict[str, float]:
    """Of each phase of one step."""
    events = [event() for _ in range(len(phases) + 1)]
    events[0].record()
    for end, call in zip(events[1:], phases.values(), strict=True):
        call()
        end.record()
    synchronize()
    return {phase: a.elapsed_time(b) for phase, (a, b) in zip(phases, itertools.pairwise(events), strict=True)}


def _by(mode: Mode, row: Row) -> Row:
    """The row with the backend that merges."""
    device = "cpu" if mode.name == HOST_ROWS else DEVICE
    backend = backends.select(device).__name__.rsplit(".", 1)[-1] if mode.ours else ""
    return dataclasses.replace(row, backend=backend)
