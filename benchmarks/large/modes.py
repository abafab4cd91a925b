"""The ways through a training step that are compared, each with the bytes that it is expected to need."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim import Optimizer

import fastpcgrad
from benchmarks import subjects
from benchmarks.large.cases import Size
from benchmarks.large.models import TaskedGpt
from benchmarks.models import Forward, clear_gradients

SLOW_UP_TO = 2e7
WHOLE = "whole step"
"""What the time of ``merge`` is a share of, among the ratios of a row."""

Phases = Mapping[str, Callable[[], object]]
"""What a step does, in sequence; ``merge`` is ``GradientSurgery.merge()`` where it is called by itself."""

Build = Callable[[TaskedGpt, Optimizer], Phases]


@dataclass(frozen=True)
class Mode:
    """One way through a step.

    Attributes:
        graph: whether each task runs a forward of its own, or all losses come from one.
        floor: the mode without surgery that it is compared with.
        beyond: bytes beyond model and activations for each parameter at T tasks, fp32 parameters: a prediction, by
            which what cannot fit is skipped.
        build: the step's phases without the optimizer's; or why there are none.
        ours: whether it is the library's: checked with the oracle.
        slow: affordable up to ``SLOW_UP_TO`` parameters.
        measured_up_to: parameters beyond which its peak is of no further interest.
    """

    name: str
    graph: Literal["own", "shared"]
    beyond: Callable[[int], float]
    build: Build | str
    ours: bool = False
    slow: bool = False
    measured_up_to: float = float("inf")

    def is_affordable(self, size: Size) -> bool:
        return not self.slow or size.parameters <= SLOW_UP_TO

    @property
    def floor(self) -> str:
        return "plain" if self.graph == "own" else "plain[shared graph]"


def _plain(model: TaskedGpt, optimizer: Optimizer) -> Phases:
    """T forward and backward passes; the last task's gradient stays."""
    parameters = model.parameters_list()

    def passes() -> None:
        for t in range(len(model.heads)):
            clear_gradients(parameters)
            model.loss(t).backward()

    return {"passes": passes}


def _plain_shared(model: TaskedGpt, optimizer: Optimizer) -> Phases:
    parameters = model.parameters_list()

    def passes() -> None:
        losses = model().losses
        for t, loss in enumerate(losses):
            clear_gradients(parameters)
            loss.backward(retain_graph=t < len(losses) - 1)

    return {"passes": passes}


def streaming(
    model: TaskedGpt, optimizer: Optimizer, row_dtype: torch.dtype | None = None, row_device: str | None = None
) -> Phases:
    """One task at a time into its row, then ``merge``."""
    surgery = fastpcgrad.GradientSurgery(optimizer, len(model.heads), row_dtype=row_dtype, row_device=row_device)

    def passes() -> None:
        for t in range(len(model.heads)):
            with surgery.task(t):
                model.loss(t).backward()

    return {"passes": passes, "merge": surgery.merge}


def _pc_backward(model: TaskedGpt, optimizer: Optimizer) -> Phases:
    wrapped = fastpcgrad.PCGrad(optimizer, variant="paper")
    return {"passes": lambda: wrapped.pc_backward(model().losses)}


def _two_phase(model: TaskedGpt, optimizer: Optimizer) -> Phases:
    surgery = fastpcgrad.GradientSurgery(optimizer, len(model.heads))
    backward = getattr(surgery, "backward")  # noqa: B009 - absent where the mode is reported as missing
    return {"passes": lambda: backward(model().losses, two_phase=True)}


def _two_phase_or_why_not() -> Build | str:
    backward = getattr(fastpcgrad.GradientSurgery, "backward", None)
    if backward is None or "two_phase" not in inspect.signature(backward).parameters:
        return "missing: this version has no GradientSurgery.backward(losses, two_phase=True)"
    return _two_phase


def _peer(name: str) -> Build | str:
    """A peer of the training steps, from its own forward on."""
    found = next(c for c in subjects.step_contenders() if c.name == name)
    if isinstance(found, subjects.Missing):
        return subjects.MISSING + found.reason
    build = found.build

    def phases(model: TaskedGpt, optimizer: Optimizer) -> Phases:
        calls = build(model, optimizer)

        def passes() -> None:
            forward: Forward = model()
            calls.merge(forward)

        return {"passes": passes}

    return phases


@functools.cache
def modes() -> tuple[Mode, ...]:
    bf16_rows = functools.partial(streaming, row_dtype=torch.bfloat16)
    return (
        Mode("plain", "own", lambda tasks: 4, _plain, measured_up_to=SLOW_UP_TO),
        Mode("plain[shared graph]", "shared", lambda tasks: 4, _plain_shared, measured_up_to=SLOW_UP_TO),
        Mode("streaming", "own", lambda tasks: 4 * tasks, streaming, ours=True),
        Mode("streaming[bf16 rows]", "own", lambda tasks: max(4, 2 * tasks), bf16_rows, ours=True),
        Mode("pc_backward", "shared", lambda tasks: 4 * tasks, _pc_backward, ours=True, measured_up_to=2e8),
        Mode("two_phase", "shared", lambda tasks: 8, _two_phase_or_why_not(), ours=True),
        Mode("torchjd", "shared", lambda tasks: 12 * tasks, _peer("torchjd"), slow=True),
        Mode("loop", "shared", lambda tasks: 16 * tasks, _peer("loop"), slow=True),
    )


def mode_named(name: str) -> Mode:
    return next(mode for mode in modes() if mode.name == name)


def step_phases(mode: Mode, model: TaskedGpt) -> Phases:
    """The whole step: the mode's phases and that of SGD without momentum, which keeps no memory of its own."""
    if isinstance(mode.build, str):
        raise ValueError(f"{mode.name} cannot be built: {mode.build}")
    optimizer = subjects.new_optimizer(model)
    return {**mode.build(model, optimizer), "step": optimizer.step}
