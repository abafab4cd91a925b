"""No speed is reported for a wrong answer: every competitor is compared with the float64 oracle first.

The measure is the library's everywhere: ‖m − m₆₄‖ ≤ tol · Σ_j |w_j| ‖g_j‖, with the order of projections that
the competitor draws from the seeded global generators. The oracle for PCGrad works on the vectors and knows
no Gram matrix.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import kernels, models
from benchmarks.cases import DTYPES, KernelCase, Op, StepCase
from benchmarks.kernels import Contender, Inputs
from benchmarks.models import Classifier, Problem
from benchmarks.modes import STEP, Mode
from benchmarks.rows import failed
from fastpcgrad import reference, variants

TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}
SHAPES = ((2, 601), (5, 1003), (8, 4096))


def objection(error: Callable[[], float]) -> str:
    """Why a subject gets no numbers: it raised, or is off the oracle; empty where it is right."""
    try:
        found = error()
    except Exception as problem:
        return failed(problem)
    return "" if found <= 1 else f"wrong: {found:.3g} times the tolerance off the float64 oracle"


def seed(value: int) -> None:
    random.seed(value)
    torch.manual_seed(value)


def kernel_error(contender: Contender, case: KernelCase) -> float:
    """The worst error over a few small shapes, in units of the tolerance: at most 1 is right."""
    assert not isinstance(contender.build, str)
    errors = []
    for tasks, width in SHAPES:
        stride = width + case.row_stride - case.width
        block = torch.randn(tasks * stride, generator=torch.Generator().manual_seed(tasks)).to(DTYPES[case.dtype])
        rows = block.as_strided((tasks, width), (stride, 1))
        error = error_on(contender, case.op, partial(copy.deepcopy, rows))
        errors.append(error / TOLERANCE[case.dtype])
    return max(errors)


def error_on(contender: Contender, op: Op, make: Callable[[], Tensor]) -> float:
    """Of one call, by the library's measure. ``make``: gives J anew, for ``mix_`` changes its rows."""
    assert not isinstance(contender.build, str)
    own, oracle = kernels.inputs(make()), kernels.inputs(make())
    call = contender.build(own)
    seed(7)
    result = call()
    assert isinstance(result, Tensor)
    error = float(_ERRORS[op](result.double(), oracle, contender.variant))
    # A NaN must not pass as small.
    return float("inf") if error != error else error


def _norms(rows: Tensor) -> Tensor:
    return rows.double().norm(dim=1)


def _gram_error(result: Tensor, x: Inputs, variant: str) -> Tensor:
    return ((result - reference.gram(x.rows)).abs() / torch.outer(_norms(x.rows), _norms(x.rows))).max()


def _combine_error(result: Tensor, x: Inputs, variant: str) -> Tensor:
    return (result.flatten() - reference.combine(x.rows, x.weights)).norm() / (x.weights.abs() @ _norms(x.rows))


def _mix_error(result: Tensor, x: Inputs, variant: str) -> Tensor:
    error = (result - reference.mix(x.rows, x.coefficients)).norm(dim=1)
    return (error / (x.coefficients.abs() @ _norms(x.rows))).max()


def _pcgrad_error(result: Tensor, x: Inputs, variant: str) -> Tensor:
    rows = list(x.rows.double().unbind())
    seed(7)
    (expected,) = reference.merge([[row] for row in rows], rows[:1], variant)
    assert expected is not None
    seed(7)
    return (result - expected).norm() / _scale(x.rows, variant)


def _scale(rows: Tensor, variant: str, partial: Tensor | None = None) -> float:
    """Σ_j w_j ‖g_j‖; ``partial`` holds the columns that are summed where the others are averaged."""
    chosen = variants.VARIANTS[variant]
    tasks = rows.shape[0]
    order = chosen.draw_order(tasks)
    joined = rows if partial is None else torch.cat([rows, partial], dim=1)
    weights = reference.coefficients(reference.gram(joined), order, chosen.guards.self_projection).sum(dim=0)
    scale = float(weights @ _norms(rows)) / (tasks if chosen.reduction == "mean" else 1)
    return scale if partial is None else scale + float(weights @ _norms(partial))


_ERRORS = {"gram": _gram_error, "combine": _combine_error, "mix_": _mix_error, "pcgrad": _pcgrad_error}


def task_gradients(problem: Problem) -> list[list[Tensor | None]]:
    parameters = problem.parameters_list()
    losses = problem().losses
    found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return [[None if grad is None else _dense(grad) for grad in row] for row in found]


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _flat(gradients: Sequence[Tensor | None], like: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    pieces = []
    for i in indices:
        gradient = gradients[i]
        pieces.append((torch.zeros_like(like[i]) if gradient is None else _dense(gradient)).double().flatten())
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)


def shared_parameters(problem: Problem) -> list[int]:
    """Indices of the parameters that belong to no single task."""
    heads = {id(p) for p in problem.heads.parameters()} if isinstance(problem, Classifier) else set()
    return [i for i, p in enumerate(problem.parameters_list()) if id(p) not in heads]


def step_error(mode: Mode, case: StepCase) -> float:
    """The same for one step on a small model of the same kind, in units of the tolerance."""
    problem = models.build_small(case)
    seed(11)
    for phase, call in mode.phases(problem).items():
        if phase != STEP:
            call()
    merged = [parameter.grad for parameter in problem.parameters_list()]

    oracle = models.build_small(case).double()
    parameters = oracle.parameters_list()
    tasks = task_gradients(oracle)
    everywhere = shared_parameters(oracle)
    heads = [i for i in range(len(parameters)) if i not in everywhere]
    if mode.variant in ("last", "none"):
        summed = reference.merge(tasks, parameters, "paper", shared=[])
        expected = summed if mode.variant == "none" else tasks[-1]
        scale = float(_flat(expected, parameters, range(len(parameters))).norm())
    else:
        seed(11)
        shared = everywhere if mode.shared_only else None
        expected = reference.merge(tasks, parameters, mode.variant, shared=shared)
        seed(11)
        scale = _scale(
            torch.stack([_flat(task, parameters, everywhere) for task in tasks]),
            mode.variant,
            torch.stack([_flat(task, parameters, heads) for task in tasks]),
        )
    every = range(len(parameters))
    error = _flat(merged, parameters, every) - _flat(expected, parameters, every)
    return float(error.norm()) / scale / TOLERANCE["bfloat16" if "bf16" in mode.name else "float32"]
