"""The ways through a training step that are compared: the library's modes, plain backward passes and the peers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Optimizer

import fastpcgrad
from benchmarks import kernels
from benchmarks.cases import TABLES, FactoredCase, Gpt, StepCase
from benchmarks.models import Forward, Problem, clear_gradients
from benchmarks.rows import LIBRARY
from benchmarks.timing import Phases

FORWARD, BACKWARDS, PASSES, MERGE, STEP = "forward", "backwards", "passes", "merge", "step"
"""Phases: all losses; T backward passes and surgery on them; forward and backward passes task by task; what is left for
``GradientSurgery.merge()`` then; the optimizer's step."""
SLOW_UP_TO = 2e7
HOST_ROWS = "streaming[host rows]"
DENSE_ROWS, FACTORED_ROWS = f"{LIBRARY}[dense rows]", f"{LIBRARY}[factored rows]"

Build = Callable[[Problem, Optimizer], Phases]


@dataclass(frozen=True)
class Mode:
    """One way through a step.

    Attributes:
        build: the step's phases, the optimizer's own added where they lack it; or why there are none.
        variant: which order of the projections it draws and from where (a name of the library's); without any
            surgery ``none`` (the gradients are summed) or ``last`` (the last task's stay).
        own_graphs: whether each task runs a forward of its own; else all losses come from one.
        shared_only: heads stay out of its surgery.
        timed: False where only its memory is of interest.
        beyond: bytes beyond model and activations for each parameter at T tasks: a prediction, by which what cannot
            fit is skipped.
        up_to, measured_up_to: parameters beyond which it is not affordable, and its peak of no further interest.
        merges_on: the device of the surgery where it is another than the model's.
    """

    name: str
    build: Build | str
    variant: str
    distribution: str = LIBRARY
    own_graphs: bool = False
    shared_only: bool = False
    timed: bool = True
    beyond: Callable[[int], float] = lambda tasks: 0.0
    up_to: float = float("inf")
    measured_up_to: float = float("inf")
    merges_on: str = ""

    @property
    def version(self) -> str:
        return "" if isinstance(self.build, str) else kernels.version(self.distribution)

    def backend(self, device: str) -> str:
        return kernels.library_backend(self.merges_on or device) if self.distribution == LIBRARY else "torch"

    def phases(self, problem: Problem) -> Phases:
        """The whole step, with SGD without momentum, which keeps no memory of its own."""
        if isinstance(self.build, str):
            raise ValueError(f"{self.name} cannot be built: {self.build}")
        optimizer = SGD(problem.parameters(), lr=1e-4)
        phases = self.build(problem, optimizer)
        return {**phases, STEP: phases.get(STEP, optimizer.step)}


def _on_losses(problem: Problem, merge: Callable[[Forward], object]) -> Phases:
    parameters = problem.parameters_list()
    built: list[Forward] = []

    def forward() -> None:
        built.clear()
        clear_gradients(parameters)
        built.append(problem())

    return {FORWARD: forward, BACKWARDS: lambda: merge(built[0])}


def _plain(problem: Problem, optimizer: Optimizer, summed: bool = False) -> Phases:
    """T backward passes and no surgery: the floor of every multi-task step that looks at task gradients.

    ``summed``: they add up in ``.grad``: what the sum of the losses costs. From the second pass on, the fresh gradient
    of one parameter exists beside the sum that it is added to.
    """
    parameters = problem.parameters_list()

    def merge(forward: Forward) -> None:
        for t, loss in enumerate(forward.losses):
            if not summed:
                clear_gradients(parameters)
            loss.backward(retain_graph=t < problem.tasks - 1)

    return _on_losses(problem, merge)


def _plain_passes(problem: Problem, optimizer: Optimizer) -> Phases:
    """T forward and backward passes; the last task's gradient stays."""
    parameters = problem.parameters_list()

    def passes() -> None:
        for t in range(problem.tasks):
            clear_gradients(parameters)
            problem.loss(t).backward()

    return {PASSES: passes}


def _drop_in(problem: Problem, optimizer: Optimizer, variant: str = "pytorch-pcgrad", **options: Any) -> Phases:
    wrapped = fastpcgrad.PCGrad(optimizer, variant=variant, **options)
    return {**_on_losses(problem, lambda forward: wrapped.pc_backward(forward.losses)), STEP: wrapped.step}


def _surgery(problem: Problem, optimizer: Optimizer) -> Phases:
    surgery = fastpcgrad.GradientSurgery(optimizer, problem.tasks, method=fastpcgrad.methods.PCGrad())

    def merge(forward: Forward) -> None:
        for t, loss in enumerate(forward.losses):
            with surgery.task(t):
                loss.backward(retain_graph=t < problem.tasks - 1)
        surgery.merge()

    return _on_losses(problem, merge)


def _functional(problem: Problem, optimizer: Optimizer) -> Phases:
    parameters, method = problem.parameters_list(), fastpcgrad.methods.PCGrad()
    call = functools.partial(fastpcgrad.backward, method=method, rows="dense")
    return _on_losses(problem, lambda forward: call(forward.losses, parameters))


def _streaming(
    problem: Problem, optimizer: Optimizer, row_dtype: torch.dtype | None = None, row_device: str | None = None
) -> Phases:
    """One task at a time into its row, then ``merge``."""
    surgery = fastpcgrad.GradientSurgery(optimizer, problem.tasks, row_dtype=row_dtype, row_device=row_device)

    def passes() -> None:
        for t in range(problem.tasks):
            with surgery.task(t):
                problem.loss(t).backward()

    return {PASSES: passes, MERGE: surgery.merge}


def _two_phase(problem: Problem, optimizer: Optimizer) -> Phases:
    surgery = fastpcgrad.GradientSurgery(optimizer, problem.tasks)
    return _on_losses(problem, lambda forward: surgery.backward(forward.losses, two_phase=True))


def _peer_modes(*names: str) -> list[Mode]:
    """Of peers of the kernels; one that can go through the tasks one by one has a second mode."""
    found = []
    for peer in kernels.PEERS:
        module = peer.module()
        for step, suffix in (("step", ""), ("step_sequential", "[one by one]")):
            name = peer.name + suffix
            if name not in names:
                continue
            build: Build | str = module if isinstance(module, str) else _of_peer(getattr(module, step))
            only = peer.variant == "torchjd"
            found.append(Mode(name, build, peer.variant, peer.distribution, shared_only=only))
    return found


def _of_peer(step: Callable[[Problem, Optimizer], Callable[[Forward], object]]) -> Build:
    return lambda problem, optimizer: _on_losses(problem, step(problem, optimizer))


def floor_of(name: str) -> str:
    """The mode of large models without surgery that one is compared with: of graphs of the same kind."""
    return "plain" if name == "plain" or name.startswith("streaming") else "plain[shared graph]"


def modes(case: StepCase, on_gpu: bool = False) -> list[Mode]:
    """Those that are compared on a case: with all peers, or the library's modes for large models."""
    if isinstance(case, FactoredCase):
        return _factored_modes()[: 3 if case.model in TABLES else None]
    return _large_modes(on_gpu) if isinstance(case.model, Gpt) else _step_modes()


def _factored_modes() -> list[Mode]:
    dense, factored = (functools.partial(_drop_in, rows=rows) for rows in ("dense", "factored"))
    return [
        Mode("plain", _plain, "last", "torch"),
        Mode(LIBRARY, _drop_in, "pytorch-pcgrad"),
        Mode(DENSE_ROWS, dense, "pytorch-pcgrad"),
        Mode(FACTORED_ROWS, factored, "pytorch-pcgrad"),
    ]


def _step_modes() -> list[Mode]:
    """With rows that are whole gradients, as everybody else's: factored ones have a part of their own."""
    dense = functools.partial(_drop_in, rows="dense")
    bf16_rows = functools.partial(_drop_in, row_dtype=torch.bfloat16)
    return [
        Mode("plain", _plain, "last", "torch"),
        Mode("accumulate", functools.partial(_plain, summed=True), "none", "torch", timed=False),
        Mode(LIBRARY, dense, "pytorch-pcgrad"),
        Mode(f"{LIBRARY}.GradientSurgery", _surgery, "paper"),
        Mode(f"{LIBRARY}.backward", _functional, "paper"),
        Mode(f"{LIBRARY}[bf16 rows]", bf16_rows, "pytorch-pcgrad", timed=False),
        *_peer_modes("torchjd", "torchjd[one by one]", "loop", "pytorch_optimizer"),
    ]


def _large_modes(on_gpu: bool) -> list[Mode]:
    bf16_rows = functools.partial(_streaming, row_dtype=torch.bfloat16)
    host_rows = functools.partial(_streaming, row_device="cpu")
    paper = functools.partial(_drop_in, variant="paper")
    plain_up_to = float("inf") if on_gpu else SLOW_UP_TO
    found = [
        Mode("plain", _plain_passes, "last", "torch", own_graphs=True, beyond=lambda t: 4, measured_up_to=plain_up_to),
        Mode("plain[shared graph]", _plain, "last", "torch", beyond=lambda t: 4, measured_up_to=plain_up_to),
        Mode("streaming", _streaming, "paper", own_graphs=True, beyond=lambda t: 4 * t),
        Mode("streaming[bf16 rows]", bf16_rows, "paper", own_graphs=True, beyond=lambda t: max(4, 2 * t)),
        Mode("pc_backward", paper, "paper", beyond=lambda t: 4 * t, measured_up_to=2e8),
        Mode("two_phase", _two_phase, "paper", beyond=lambda t: 8),
    ]
    if on_gpu:
        return [*found, Mode(HOST_ROWS, host_rows, "paper", own_graphs=True, beyond=lambda t: 8, merges_on="cpu")]
    torchjd, loop = _peer_modes("torchjd", "loop")
    return [
        *found,
        dataclasses.replace(torchjd, beyond=lambda t: 12 * t, up_to=SLOW_UP_TO),
        dataclasses.replace(loop, beyond=lambda t: 16 * t, up_to=SLOW_UP_TO),
    ]
