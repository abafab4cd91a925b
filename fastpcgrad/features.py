"""shared_features: surgery on the gradients at a shared representation, so that the trunk is walked backward once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._blocks import addresses
from ._losses import check_tensors
from ._tasks import TaskNames, check_tasks
from .distributed.exchange import Averaging
from .distributed.processes import Choice, check_groups, groups_behind
from .merging.by_rows import merge
from .merging.report import ConflictReport
from .methods import Method, PCGrad, Tracking, check_method
from .rows.task_gradients import Row, TaskGradients

OnReport = Callable[[ConflictReport], object]
"""What is called with the report of a surgery."""


@overload
def shared_features(
    z: Tensor,
    num_tasks: int | None = None,
    method: Method | None = None,
    *,
    tasks: Sequence[str] | int | None = None,
    allow_absent: bool = False,
    on_report: OnReport | None = None,
    process_group: object = "auto",
) -> tuple[Tensor, ...]: ...


@overload
def shared_features(
    z: Sequence[Tensor],
    num_tasks: int | None = None,
    method: Method | None = None,
    *,
    tasks: Sequence[str] | int | None = None,
    allow_absent: bool = False,
    on_report: OnReport | None = None,
    process_group: object = "auto",
) -> tuple[tuple[Tensor, ...], ...]: ...


def shared_features(
    z: Tensor | Sequence[Tensor],
    num_tasks: int | None = None,
    method: Method | None = None,
    *,
    tasks: Sequence[str] | int | None = None,
    allow_absent: bool = False,
    on_report: OnReport | None = None,
    process_group: object = "auto",
) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], ...]:
    """Hand the trunk's output to each task's head, so that the task gradients undergo surgery there.

    Run all losses backward at once, with ``sum(losses).backward()`` or ``torch.autograd.backward(losses)``. Where the
    T gradients with respect to ``z`` meet, they are the rows of J, and the merged one goes on into the trunk: one
    backward pass through the trunk instead of T. Each head gets its plain gradient.

    This approximates surgery on the trunk's parameters: gradients may conflict at ``z`` and not there, or there and
    not at ``z``, for the trunk's Jacobian lies between the two. The methods and their guarantees hold for the gradients
    at ``z``.

    Args:
        z: what the trunk gives, of any shape, fp16/bf16/fp32/fp64; or several such tensors, which form one problem.
            Where one is computed from another, that path does not count for the other.
        num_tasks: T; or ``tasks``.
        method: any ``methods.Method``; None: ``methods.PCGrad()``. One that keeps state must live between the steps.
        tasks: their names, which the reports have, in the order of what is returned; or T.
        allow_absent: whether tasks may be without a gradient; they then take no part in the surgery. If they must
            not, which is the default, a task whose gradient does not come with the others' is an error: it is most
            often one whose loss is run backward in a call of its own, where there is nothing to merge it with.
        on_report: called in each backward pass with the ``ConflictReport`` of its surgery.
        process_group: over whose parts of the batch the surgery goes: their G is summed, 8 T² bytes, and all take the
            same weights. ``auto``: those over which DistributedDataParallel averages the parameters that ``z`` depends
            on; a warning, once, where there are several processes without it. A process group, or a device mesh: those,
            whose losses are taken to be averaged. ``local``: each process looks at its own part alone: under
            DistributedDataParallel a mean of surgeries, not the surgery of the whole batch.
    Returns:
        for each task ``z`` again (a tuple, where several tensors were given), in the same memory: operations in place
        are refused, use ``clone()`` before them. With gradients switched off, as in evaluation, ``z`` itself.
    Raises:
        TypeError: ``z`` that is no tensor or of a dtype that gradients cannot have, or a method that is none.
        ValueError: ``num_tasks`` < 1, no tensors, or ``z`` does not require grad.
        TypeError, ValueError: another ``process_group``.
        NotImplementedError: with ``auto`` or ``local``, ``z`` depends on sharded parameters, of FSDP, fully_shard or
            tensor parallelism.
        RuntimeError: in the backward pass, where a task's gradient is missing; or in a second derivative. Nothing of
            the trunk has a gradient then.
    Memory: during the surgery T + 1 gradients of the size of ``z``, of which autograd had made T already.
    Numerics: the rows have the dtype of ``z``; NaN and inf go on into the trunk.
    Compilation: ``torch.compile`` breaks the graph here: trunk and heads are compiled by themselves, and
        ``fullgraph=True`` is refused unless gradients are switched off. Heads in one compiled graph give zeros, not
        nothing, for losses that are not run backward: such tasks cannot be told from present ones.
    Source: Sener & Koltun 2018, arXiv:1810.04650, §3.3 (MGDA-UB is this with ``methods.MGDA()``). Oracle:
        ``reference.merge`` on the gradients at ``z``.
    Example:
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> features = fastpcgrad.shared_features(trunk(torch.randn(16, 4)).relu(), num_tasks=2)
        >>> losses = [head(own).square().mean() for head, own in zip(heads, features)]
        >>> sum(losses).backward()
        >>> trunk.weight.grad.shape
        torch.Size([8, 4])
    """
    count, names = check_tasks(num_tasks, tasks)
    method = check_method(method, PCGrad)
    if isinstance(method, Tracking):
        raise TypeError(
            f"{type(method).__name__} keeps something of each column, and the features of another batch have other "
            "columns: use it in GradientSurgery on the parameters of the trunk"
        )
    choice = check_groups(process_group)
    features = [z] if isinstance(z, Tensor) else check_tensors("z", z)
    if not features:
        raise ValueError("z must hold at least one tensor; found none")
    if on_report is not None and names:
        on_report = _naming(names, on_report)
    if torch.is_grad_enabled():
        hand_out = _hand_out
        if torch.compiler.is_compiling():
            hand_out = torch.compiler.disable(_hand_out, reason="surgery needs the gradients themselves")
        flat = hand_out(features, count, method, allow_absent, on_report, choice)
    else:
        flat = (*features,) * count
    if isinstance(z, Tensor):
        return flat
    return tuple(flat[start : start + len(features)] for start in range(0, len(flat), len(features)))


def _naming(names: TaskNames, on_report: OnReport) -> OnReport:
    def named(report: ConflictReport) -> None:
        report.names = names
        on_report(report)

    return named


def _hand_out(
    features: Sequence[Tensor],
    num_tasks: int,
    method: Method,
    allow_absent: bool,
    on_report: OnReport | None,
    process_group: Choice | list[Any],
) -> tuple[Tensor, ...]:
    """The features T times, task after task, with the surgery behind them."""
    TaskGradients(features)  # for its errors
    for index, feature in enumerate(features):
        if not feature.requires_grad:
            raise ValueError(f"z must require grad; found tensor {index} of shape {list(feature.shape)} that does not")
    groups = groups_behind(features, process_group)
    averaging = Averaging(groups) if groups else None
    flat: tuple[Tensor, ...] = _Surgery.apply(num_tasks, method, allow_absent, on_report, averaging, *features)
    return flat


class _Surgery(torch.autograd.Function):
    """Forward: T times the features, task after task. Backward: what comes back for them, merged."""

    @staticmethod
    def forward(
        ctx: Any,
        num_tasks: int,
        method: Method,
        allow_absent: bool,
        on_report: OnReport | None,
        averaging: Averaging | None,
        *features: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.num_tasks, ctx.method, ctx.allow_absent, ctx.on_report = num_tasks, method, allow_absent, on_report
        ctx.averaging, ctx.kinds = averaging, [(feature.shape, feature.dtype, feature.device) for feature in features]
        return tuple(feature.view_as(feature) for _ in range(num_tasks) for feature in features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        width = len(grads) // ctx.num_tasks
        rows = _apart([list(grads[start : start + width]) for start in range(0, len(grads), width)])
        if ctx.averaging is not None:
            _fill_with_zeros(rows, ctx.averaging, ctx.kinds)
        present = [t for t, row in enumerate(rows) if any(grad is not None for grad in row)]
        absent = sorted(set(range(ctx.num_tasks)).difference(present))
        if absent and present and not ctx.allow_absent:
            raise RuntimeError(
                f"shared_features: no gradient came from tasks {absent} together with those of tasks {present}; run "
                "all losses backward at once, with sum(losses).backward() or torch.autograd.backward(losses), or pass "
                "allow_absent=True if a task may be without a loss"
            )
        merged: Row = [None] * width
        first = [next((grad for grad in column if grad is not None), None) for column in zip(*rows, strict=True)]
        touched = [index for index, grad in enumerate(first) if grad is not None]
        if touched:
            task_gradients = TaskGradients([grad for grad in first if grad is not None])
            for t in present:
                task_gradients.put(t, [rows[t][index] for index in touched])
            report, found = merge(task_gradients, ctx.method, in_place=False, exchange=ctx.averaging)
            for index, grad in zip(touched, found, strict=True):
                merged[index] = grad
            if ctx.on_report is not None:
                ctx.on_report(report)
        return None, None, None, None, None, *merged


def _fill_with_zeros(rows: list[Row], averaging: Averaging, kinds: Sequence[tuple[Any, ...]]) -> None:
    """Zeros for the gradients that are not here but in another process."""
    there = averaging.present([[grad is not None for grad in row] for row in rows], kinds[0][2])
    for row, flags in zip(rows, there, strict=True):
        for index, (shape, dtype, device) in enumerate(kinds):
            if flags[index] and row[index] is None:
                row[index] = torch.zeros(shape, dtype=dtype, device=device)


def _apart(rows: list[Row]) -> list[Row]:
    """The rows dense, and each gradient by itself: autograd hands one tensor to all that an addition joins."""
    seen: set[int] = set()
    for row in rows:
        for index, grad in enumerate(row):
            if grad is None:
                continue
            own = grad if grad.layout == torch.strided else grad.to_dense()
            (address,) = addresses([own])
            row[index] = own.clone() if address in seen else own
            seen.add(address)
    return rows
