"""GradientSurgery: one task at a time into its row, then one merged gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter, is_
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from . import host_rows
from ._graph import check_kept, explain, run_backward
from .capture import Capture, MovedCapture
from .functional import check_loss, check_losses, check_tensors
from .memory import MemoryPlan, plan_memory, plan_two_phase
from .merging import merge
from .methods import Method, PCGrad, check_method
from .moved_gradients import MovedGradients, check_accumulate_dtype
from .parameters import Granularity, check_granularity, check_parameters, parameter_source, problem_of_each
from .report import ConflictReport
from .task_gradients import TaskGradients
from .two_phase import merge_in_two_phases

_KIND = attrgetter("dtype", "device", "shape")

Forward = Callable[[], Tensor | None]
"""Runs a task's forward and gives its loss; None: the task is absent."""


class GradientSurgery:
    """Takes each task's gradient as its row of J, then merges the rows into ``.grad``.

    Inside ``task(t)`` gradients collect in ``.grad`` as ever; several backward passes of one task add up. Leaving it
    takes them away as row t, without a copy. Each task's graph can be freed before the next task's forward. ``merge``
    replaces ``.grad`` of every parameter that takes part: it is written over one of the rows.

    Args:
        optimizer_or_params: an optimizer, or parameters (or dicts of them, as optimizers take). An optimizer's
            parameters are looked up at each round, so that ones added, frozen or unfrozen later are seen.
        num_tasks: T.
        method: makes weights of the Gram matrix; None: ``methods.PCGrad()``.
        shared: the parameters that undergo surgery; the gradients of the others are summed. None: as the method's
            original has it (nearly all: every parameter).
        row_dtype: dtype of the rows; None: that of the parameters. bfloat16 halves the memory.
        row_device: ``"cpu"``: parameters on a CUDA device have their rows in page-locked host memory; each gradient
            is sent there as soon as autograd has it, and the surgery runs on the host. The report is there too. A
            gradient must not be overwritten before its task is left. None: where the parameters are.
        accumulate: ``sum``: all that a task's stays bring adds up. ``mean``: that is divided by how many stays there
            were, so that tasks of different numbers of micro-batches count alike. Backward passes within one stay
            add up either way.
        accumulate_dtype: dtype in which gradients within one stay add up, on the parameters' device, before they are
            rounded to the rows'; each further stay widens, adds and rounds once more. None: the rows' own.
        granularity: ``model``: one surgery over all parameters. ``group`` or ``parameter``: one for each parameter
            group, or for each parameter. Collections of parameters, such as those of each layer: one for each, in
            one pass over all. A method whose original works on each parameter does so anyway.
        process_group: None; distributed training is not covered by this version.
    Memory: T rows of N elements, where N counts the trainable parameters: T·N·itemsize bytes, of which one row becomes
        ``.grad``. On the CPU they stay mapped until the next round's gradients take their place, one by one. Rows of
        another dtype than the parameters are freed parameter by parameter as merged gradients take their place.
        ``memory_plan`` tells the bytes beforehand.
    Raises:
        TypeError: parameters that are no tensors, or of a dtype that rows cannot have.
        ValueError: no parameters, parameters that are no leaves, on several devices or of several dtypes; a parameter
            in two or in none of the collections of ``granularity``; rows that cannot have that device, or sums that
            cannot have that dtype.
    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> surgery = fastpcgrad.GradientSurgery(model.parameters(), num_tasks=2)
        >>> for t in range(2):
        ...     with surgery.task(t):
        ...         model(torch.randn(8, 4))[:, t].square().mean().backward()
        >>> report = surgery.merge()
        >>> report.gram.shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        optimizer_or_params: torch.optim.Optimizer | Iterable[Any],
        num_tasks: int,
        method: Method | None = None,
        *,
        shared: Iterable[Tensor] | None = None,
        row_dtype: torch.dtype | None = None,
        row_device: torch.device | str | None = None,
        accumulate: Literal["sum", "mean"] = "sum",
        accumulate_dtype: torch.dtype | None = None,
        granularity: Granularity = "model",
        process_group: object | None = None,
    ) -> None:
        if not isinstance(num_tasks, int) or num_tasks < 1:
            raise ValueError(f"num_tasks must be an integer >= 1; found {num_tasks!r}")
        if accumulate not in ("sum", "mean"):
            raise ValueError(f"accumulate must be 'sum' or 'mean'; found {accumulate!r}")
        if process_group is not None:
            raise NotImplementedError("this version does not reduce gradients over processes: process_group=None")
        self.num_tasks = num_tasks
        self.method = check_method(method, PCGrad)
        self.granularity = check_granularity(granularity)
        self.row_dtype, self.row_device = row_dtype, row_device
        self.accumulate, self.accumulate_dtype = accumulate, accumulate_dtype
        self._source = parameter_source(optimizer_or_params)
        self._shared = None if shared is None else {id(p): p for p in check_tensors("shared", shared)}
        self._inside = False
        self._lay_out(self._trainable())

    @property
    def nbytes(self) -> int:
        """Bytes of T rows, whether or not they are there yet."""
        return self.num_tasks * self._capture.rows.row_nbytes

    def task(self, index: int) -> AbstractContextManager[Any]:
        """A context in which gradients go into the row of task ``index``.

        Enter it again for further micro-batches of the same task: they add up. A task counts as present, with a
        zero gradient for what it did not touch, once it was entered and left without an exception.

        Raises:
            IndexError: not in 0..num_tasks-1.
            RuntimeError: inside another task, or the parameters changed since the round began.
        """
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.num_tasks:
            raise IndexError(f"task index must be an integer in 0..{self.num_tasks - 1}; found {index!r}")
        return _Task(self, index)

    def backward(
        self,
        losses: Sequence[Forward | None] | Sequence[Tensor | None] | Tensor,
        *,
        retain_graph: bool = False,
        two_phase: bool = False,
    ) -> ConflictReport:
        """A whole round: run each task's loss backward inside its task, then ``merge``.

        Args:
            losses: one for each task, None for one that is absent. Functions run their own forward and return the
                scalar loss, or None; each graph is freed before the next forward. Or scalar tensors, or one tensor
                ``[T]``, which may share a graph.
            retain_graph: keep the graphs for another backward pass; else the last pass over tensors frees them.
            two_phase: make no rows, but the Gram matrix piece by piece of the graph, then the merged gradient in one
                weighted backward pass: about N elements at once instead of T·N, for one more backward pass. For
                tensors only. See ``fastpcgrad.two_phase``.
        Returns:
            what conflicted and what became of it.
        Raises:
            TypeError: losses that are neither functions nor real floating-point tensors, or both; functions or a
                method that needs the rows with ``two_phase``.
            ValueError: not T of them, all absent, not scalar, without grad, on several devices.
            RuntimeError: inside a task, rows of this round are filled, or a function ran backward but returned None.
            ValueError, RuntimeError: what ``two_phase`` cannot do or finds to be wrong.
            Whatever a forward or backward pass raises. Errors within the round discard it; ``.grad`` is then as
            before, but None where it held the last merged gradient, which ends as the round begins.
        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> surgery = fastpcgrad.GradientSurgery(model.parameters(), num_tasks=2)
            >>> batches = torch.randn(2, 8, 4)
            >>> report = surgery.backward([lambda x=x: model(x).square().mean() for x in batches])
            >>> report.tasks
            (0, 1)
        """
        if self._inside:
            raise RuntimeError(f"backward() inside task({self._capture.task}): leave the task first")
        if filled := self._capture.rows.tasks:
            raise RuntimeError(f"backward() with rows of tasks {filled} filled: call merge() or discard() first")
        tensors, forwards = _check_round(losses, self.num_tasks)
        if two_phase:
            return self._in_two_phases(tensors, forwards, retain_graph)
        try:
            if forwards:
                self._run_forwards(forwards, retain_graph)
            else:
                self._run(list(tensors.values()), retain_graph, list(tensors))
            return self.merge()
        except BaseException:
            self._capture.rows.clear()
            raise

    def memory_plan(self, *, two_phase: bool = False) -> MemoryPlan:
        """Bytes that a round takes beyond model and activations, before anything is allocated.

        Every task counts with all parameters: an upper bound where some are touched by some tasks only.

        Args:
            two_phase: of ``backward(..., two_phase=True)``, as far as it is known before there is a graph: pieces may
                be somewhat larger, and what crosses from one to the next counts as activations.
        Warns:
            MemoryPlanWarning: more than is free.
        Example:
            >>> surgery = fastpcgrad.GradientSurgery(torch.nn.Linear(1000, 1000).parameters(), num_tasks=4)
            >>> surgery.memory_plan().device.rows
            16016000
        """
        self._resolve()
        parameters, rows = self._capture.parameters, self._capture.rows
        moved = rows if isinstance(rows, MovedGradients) else None
        if two_phase:
            plan = plan_two_phase(self.num_tasks, parameters)
        else:
            plan = plan_memory(
                self.num_tasks,
                parameters,
                rows.dtype,
                moved=moved is not None,
                accumulate_dtype=None if moved is None else moved.accumulate_dtype,
                on_host=moved is not None and moved.on_host,
                problems=len(parameters if self.method.scope == "parameter" else set(self._problems or [0])),
            )
        plan.warn()
        return plan

    def merge(self) -> ConflictReport:
        """Merge the rows of this round into ``.grad``.

        Tasks that were absent take no part. A parameter that no task touched gets ``.grad = None``.

        Returns:
            what conflicted and what became of it.
        Raises:
            RuntimeError: no task was there, or inside a task. Nothing is changed.
            torch.OutOfMemoryError: no room to convert the merged gradient or to send it back. The round is over, and
                ``.grad`` is None.
        """
        capture, grads = self._capture, self._capture.rows
        if self._inside:
            raise RuntimeError(f"merge() inside task({self._capture.task}): leave the task first")
        if not grads.tasks:
            raise RuntimeError("merge() with no task: fill rows inside 'with surgery.task(t)' first")
        if self.accumulate == "mean":
            grads.average()
        report, merged = merge(grads, self.method, self._shared_ones(), self._problems, in_place=True)
        capture.give(merged)
        grads.clear()
        return report

    def discard(self) -> None:
        """Forget the rows of this round, as if no task had been there; ``.grad`` stays as it is.

        Raises:
            RuntimeError: inside a task.
        """
        if self._inside:
            raise RuntimeError(f"discard() inside task({self._capture.task}): leave the task first")
        self._capture.rows.clear()

    def _resolve(self) -> None:
        """Look the trainable parameters up; lay the rows out anew where they changed."""
        found, filled = self._trainable(), self._capture.rows.tasks
        same = len(found) == len(self._found) and all(map(is_, found, self._found))
        if same and (filled or list(map(_KIND, found)) == self._kinds):
            return
        if filled:
            raise RuntimeError(
                f"the trainable parameters changed within a round ({len(self._found)} before, {len(found)} now) "
                f"while rows of tasks {filled} are filled: call merge() or discard() first"
            )
        self._lay_out(found)

    def _trainable(self) -> list[Tensor]:
        return [p for group in self._source.param_groups for p in group["params"] if p.requires_grad]

    def _lay_out(self, found: list[Tensor]) -> None:
        parameters = list({id(p): p for p in found}.values())
        check_parameters(parameters, self._shared, self.row_dtype)
        problems = problem_of_each(parameters, self.granularity, self._source.param_groups, self._shared)
        self._capture = self._capture_for(parameters)
        self._found, self._problems = found, problems
        self._kinds = list(map(_KIND, found))

    def _capture_for(self, parameters: Sequence[Tensor]) -> Capture:
        """Of rows as autograd leaves them, or of such that are converted or sent away."""
        plain = TaskGradients(parameters, self.row_dtype)
        copies = host_rows.copies_for(plain.device, self.row_device)
        sums = self.accumulate_dtype
        if sums is not None:
            check_accumulate_dtype(sums, plain.dtype)
            if sums == plain.dtype and copies is None:  # the rows themselves will do
                sums = None
        if copies is None and sums is None and all(p.dtype == plain.dtype for p in parameters):
            return Capture(parameters, plain)
        return MovedCapture(parameters, MovedGradients(parameters, plain.dtype, sums, copies))

    def _run(self, losses: Sequence[Tensor], retain_graph: bool, indices: Sequence[int] | None = None) -> None:
        """Each loss backward inside its task; only the last pass frees what graphs they share."""
        left = len(losses)
        if left > 1 or retain_graph:
            check_kept(losses)
        with _Stay(self) as capture:
            for index, loss in zip(indices or range(left), losses, strict=True):
                left -= 1
                capture.open(index)
                run_backward(loss, retain_graph or left > 0)
                capture.close()

    def _in_two_phases(
        self, losses: dict[int, Tensor], forwards: dict[int, Forward], retain_graph: bool
    ) -> ConflictReport:
        if forwards:
            raise TypeError(f"two_phase needs losses, not functions; found functions for tasks {list(forwards)}")
        if self.granularity != "model":
            raise ValueError(f"two_phase solves one problem; found granularity={self.granularity!r}")
        self._resolve()
        capture = self._capture
        if isinstance(capture, MovedCapture):
            raise ValueError(
                "two_phase keeps no rows: leave row_dtype, row_device and accumulate_dtype None; found "
                f"{self.row_dtype}, {self.row_device}, {self.accumulate_dtype}"
            )
        capture.rows.free()
        with _Stay(self):
            report, merged = merge_in_two_phases(
                list(losses.values()),
                capture.parameters,
                self.method,
                tasks=list(losses),
                shared=self._shared_ones(),
                retain_graph=retain_graph,
            )
        capture.give(merged)
        return report

    def _shared_ones(self) -> list[bool] | None:
        """For each parameter whether it undergoes surgery; None: as the method's scope says."""
        return None if self._shared is None else [id(p) in self._shared for p in self._capture.parameters]

    def _run_forwards(self, forwards: dict[int, Forward], retain_graph: bool) -> None:
        """Each forward, and its loss backward, inside its task."""
        with _Stay(self) as capture:
            for index, forward in forwards.items():
                capture.open(index)
                loss = forward()
                if loss is None:
                    if capture.drop():
                        raise RuntimeError(
                            f"losses[{index}]() returned None, which says that the task is absent, but left gradients: "
                            "let it return the loss, without running it backward"
                        )
                    continue
                run_backward(check_loss(f"losses[{index}]()", loss), retain_graph)
                del loss  # and with it the graph, before the next forward
                capture.close()


class _Stay:
    """A stay inside tasks, one after the other. Gradients that were there before come back at the end."""

    def __init__(self, surgery: GradientSurgery) -> None:
        self._surgery = surgery
        self._aside: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Capture:
        surgery = self._surgery
        surgery._resolve()
        capture = surgery._capture
        self._aside = capture.set_aside()
        surgery._inside = True
        return capture

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        surgery = self._surgery
        surgery._inside = False
        if error is not None:  # what there is is no whole gradient: the open task is absent unless it is opened again
            surgery._capture.drop()
        for p, grad in self._aside:
            p.grad = grad
        if error is not None:
            explain(error)


class _Task(_Stay):
    """A stay inside one task."""

    def __init__(self, surgery: GradientSurgery, index: int) -> None:
        super().__init__(surgery)
        self._index = index

    def __enter__(self) -> Capture:
        if self._surgery._inside:
            raise RuntimeError(f"task({self._index}) inside task({self._surgery._capture.task}): tasks do not nest")
        capture = super().__enter__()
        try:
            capture.open(self._index)
        except BaseException as error:
            super().__exit__(type(error), error, error.__traceback__)
            raise
        return capture

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._surgery._capture.close()
        finally:
            super().__exit__(kind, error, trace)


def _check_round(
    losses: Sequence[Forward | None] | Sequence[Tensor | None] | Tensor, tasks: int
) -> tuple[dict[int, Tensor], dict[int, Forward]]:
    """Losses, or functions that give them, by the index of their task; without those that are absent."""
    given: Any = check_losses(losses) if isinstance(losses, Tensor) else losses
    if not isinstance(given, Iterable):
        raise TypeError(f"losses must be a sequence of functions or scalar tensors; found {type(losses).__name__}")
    given = list(given)
    if len(given) != tasks:
        raise ValueError(f"losses must hold one for each of the {tasks} tasks, None for one absent; found {len(given)}")
    there = {t: loss for t, loss in enumerate(given) if loss is not None}
    if not there:
        raise ValueError(f"losses must hold a task that is not absent; found {tasks} times None")
    functions = {t: loss for t, loss in there.items() if callable(loss)}
    if len(functions) == len(there):
        return {}, functions
    for t, loss in there.items():
        if functions and isinstance(loss, Tensor):
            raise TypeError(
                f"losses must be all functions or all tensors; found tasks {list(functions)} with functions"
            )
        if t not in functions:
            check_loss(f"losses[{t}]", loss)
    check_losses(list(there.values()))  # together: on one device
    return there, {}
