"""No speed is reported for a wrong answer: every competitor is compared with the float64 oracle first.

The measure is the library's everywhere: ‖m − m₆₄‖ ≤ tol · Σ_j |w_j| ‖g_j‖, with the order of projections that
the competitor draws from the seeded global generators. The oracle for PCGrad works on the vectors and knows
no Gram matrix.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.cases import DTYPES, KernelCase, StepCase
from benchmarks.models import Problem
from benchmarks.subjects import (
    KernelContender,
    KernelInputs,
    StepContender,
    kernel_inputs,
    new_optimizer,
    shared_parameters,
)
from fastpcgrad import reference, variants

TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}
SHAPES = ((2, 601), (5, 1003), (8, 4096))


def seed(value: int) -> None:
    random.seed(value)
    torch.manual_seed(value)


def kernel_error(contender: KernelContender, case: KernelCase) -> float:
    """The worst error over a few small shapes, in units of the tolerance: at most 1 is right."""
    errors = []
    for tasks, width in SHAPES:
        stride = width + case.row_stride - case.width
        block = torch.randn(tasks * stride, generator=torch.Generator().manual_seed(tasks))
        rows = block.to(DTYPES[case.dtype]).as_strided((tasks, width), (stride, 1))
        errors.append(_OPS[case.op](contender, kernel_inputs(rows)) / TOLERANCE[case.dtype])
    # A NaN must not pass as small.
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _norms(rows: Tensor) -> Tensor:
    return rows.double().norm(dim=1)


def _call(contender: KernelContender, inputs: KernelInputs) -> Tensor:
    result = contender.build(inputs)()
    assert isinstance(result, Tensor)
    return result.double()


def _gram_error(contender: KernelContender, inputs: KernelInputs) -> float:
    norms = _norms(inputs.rows)
    error = _call(contender, inputs) - reference.gram(inputs.rows)
    return float((error.abs() / torch.outer(norms, norms)).max())


def _combine_error(contender: KernelContender, inputs: KernelInputs) -> float:
    error = _call(contender, inputs).flatten() - reference.combine(inputs.rows, inputs.weights)
    return float(error.norm() / (inputs.weights.abs() @ _norms(inputs.rows)))


def _mix_error(contender: KernelContender, inputs: KernelInputs) -> float:
    norms, expected = _norms(inputs.rows), reference.mix(inputs.rows, inputs.coefficients)
    error = _call(contender, inputs) - expected
    return float((error.norm(dim=1) / (inputs.coefficients.abs() @ norms)).max())


def _pcgrad_error(contender: KernelContender, inputs: KernelInputs) -> float:
    seed(7)
    result = _call(contender, inputs)
    rows = list(inputs.rows.double().unbind())
    seed(7)
    (expected,) = reference.merge([[row] for row in rows], rows[:1], contender.variant)
    assert expected is not None
    seed(7)
    return float((result - expected).norm() / _scale(inputs.rows, contender.variant))


def _scale(rows: Tensor, variant: str, partial: Tensor | None = None) -> float:
    """Σ_j w_j ‖g_j‖; ``partial`` holds the columns that are summed where the others are averaged."""
    chosen = variants.VARIANTS[variant]
    tasks = rows.shape[0]
    order = chosen.draw_order(tasks)
    joined = rows if partial is None else torch.cat([rows, partial], dim=1)
    weights = reference.coefficients(reference.gram(joined), order, chosen.guards.self_projection).sum(dim=0)
    scale = float(weights @ _norms(rows)) / (tasks if chosen.reduction == "mean" else 1)
    return scale if partial is None else scale + float(weights @ _norms(partial))


_OPS = {"gram": _gram_error, "combine": _combine_error, "mix_": _mix_error, "pcgrad": _pcgrad_error}


def task_gradients(problem: Problem) -> list[list[Tensor | None]]:
    parameters = problem.parameters_list()
    losses = problem().losses
    return [list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)) for loss in losses]


def _flat(gradients: Sequence[Tensor | None], like: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    pieces = []
    for i in indices:
        gradient = gradients[i]
        pieces.append((torch.zeros_like(like[i]) if gradient is None else gradient).double().flatten())
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)


def step_error(contender: StepContender, case: StepCase) -> float:
    """The same for one merge on a small model of the same kind, in units of the tolerance."""
    problem = models.build_small(case)
    calls = contender.build(problem, new_optimizer(problem))
    forward = problem()
    seed(11)
    calls.merge(forward)
    merged = [parameter.grad for parameter in problem.parameters_list()]

    oracle = models.build_small(case).double()
    parameters = oracle.parameters_list()
    tasks = task_gradients(oracle)
    everywhere = shared_parameters(oracle)
    heads = [i for i in range(len(parameters)) if i not in everywhere]
    if contender.variant in ("last", "none"):
        summed = reference.merge(tasks, parameters, "paper", shared=[])
        expected = summed if contender.variant == "none" else tasks[-1]
        scale = float(_flat(expected, parameters, range(len(parameters))).norm())
    else:
        seed(11)
        shared = everywhere if contender.shared_only else None
        expected = reference.merge(tasks, parameters, contender.variant, shared=shared)
        seed(11)
        scale = _scale(
            torch.stack([_flat(task, parameters, everywhere) for task in tasks]),
            contender.variant,
            torch.stack([_flat(task, parameters, heads) for task in tasks]),
        )
    every = range(len(parameters))
    error = _flat(merged, parameters, every) - _flat(expected, parameters, every)
    tolerance = TOLERANCE["bfloat16"] if "bf16" in contender.name else TOLERANCE["float32"]
    return float(error.norm()) / scale / tolerance
