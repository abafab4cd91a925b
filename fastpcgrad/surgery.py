"""GradientSurgery: one task at a time into its row, then one merged gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter, is_
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._generators import global_states, set_global_states, set_state, state_of
from ._gradients import as_real, gradient_dtype
from ._graph import check_kept, explain, run_backward
from .distributed.processes import Processes
from .functional import check_loss, check_tensors, present_losses
from .merging.by_factors import is_large, planned
from .merging.by_rows import merge
from .merging.report import ConflictReport
from .merging.two_phase import merge_in_two_phases
from .methods import Method, PCGrad, check_method
from .rows import host
from .rows.capture import Capture, MovedCapture
from .rows.choice import LEAST_ELEMENTS, Choice, RowsReport, check_rows
from .rows.factors import Factors, all_dense
from .rows.memory_plan import MemoryPlan, plan_factored, plan_memory, plan_two_phase
from .rows.moved import MovedGradients, check_accumulate_dtype
from .rows.parameters import (
    Division,
    Granularity,
    HasGroups,
    are_among,
    check_granularity,
    check_parameters,
    parameter_source,
    problem_of_each,
)
from .rows.stacked import Trial, Trunk, find_trunk, may_stack, run_stacked
from .rows.task_gradients import TaskGradients

_KIND = attrgetter(*("dtype", "device", "shape"), *(("grad_dtype",) if hasattr(Tensor, "grad_dtype") else ()))

_SMALL = RowsReport(dense={f"the model's matrices have less than {LEAST_ELEMENTS} elements": 1})
_BY_CALLER = RowsReport(dense={"backward passes that the surgery did not run": 1})

Forward = Callable[[], Tensor | None]
"""Runs a task's forward and gives its loss; None: the task is absent."""


class _Layout(NamedTuple):
    """What a round knows of its parameters.

    Attributes:
        found: the trainable ones, as the source has them.
        kinds: dtype, device, shape and dtype of the gradient of each; None for one that is lazy.
        division: which of the different ones form one problem.
        capture: their rows.
        lazy: whether some have no shape yet, and no row.
        is_large: whether it may pay to keep task gradients as factors.
    """

    found: list[Tensor]
    kinds: Sequence[tuple[Any, ...] | None]
    division: Division
    capture: Capture
    lazy: bool
    is_large: bool


class GradientSurgery:
    """Takes each task's gradient as its row of J, then merges the rows into ``.grad``.

    Inside ``task(t)`` gradients collect in ``.grad`` as ever; several backward passes of one task add up. Leaving it
    takes them away as row t, without a copy. Each task's graph can be freed before the next task's forward. ``merge``
    replaces ``.grad`` of every parameter that takes part: it is written over one of the rows.

    Args:
        optimizer_or_params: an optimizer (or what has its ``param_groups``), or parameters (or dicts of them, as
            optimizers take). An optimizer's parameters are looked up at each round, so that ones added, frozen or
            unfrozen later are seen; lazy ones, once a forward pass has given them a shape. The gradients of complex
            ones are rows of real and imaginary parts.
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
        process_group: ``auto``: in a round with several processes, parameters whose gradients a module averages over
            them, or that are sharded, are refused, and others get one warning. ``local``: each process merges by
            itself; under DistributedDataParallel with one forward a task, inside ``task(t)``, the rows are averaged.
        rows: how ``backward`` of losses that share a graph keeps the gradients of weights that matrix products alone
            use. ``factored``: of each task only what comes into the products, from which G and the merged gradient are
            made without the tasks' own. ``auto``: so where that takes less time, in models on a CPU with a million
            elements in such weights or more, in one process. ``dense``: as they are. Everything else is kept as it is
            in either case, and what cannot be had exactly from factors too: ``report.rows`` says what was done and
            why. ``fastpcgrad.dense_rows()`` and ``FASTPCGRAD_ROWS=dense`` switch it off.
    Memory: T rows of N elements, where N counts the trainable parameters: T·N·itemsize bytes, of which one row becomes
        ``.grad``. On the CPU they stay mapped until the next round's gradients take their place, one by one. Rows of
        another dtype than the parameters are freed parameter by parameter as merged gradients take their place.
        Weights that are kept as factors take N elements instead of T·N, besides T gradients of activations.
        ``memory_plan`` tells the bytes beforehand.
    Numerics: G and merged gradients from factors have the rounding errors of matrix products, G in float64; their bits
        may differ from those with dense rows, and with the number of threads, as those of torch's products do.
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
        optimizer_or_params: HasGroups | Iterable[Any],
        num_tasks: int,
        method: Method | None = None,
        *,
        shared: Iterable[Tensor] | None = None,
        row_dtype: torch.dtype | None = None,
        row_device: torch.device | str | None = None,
        accumulate: Literal["sum", "mean"] = "sum",
        accumulate_dtype: torch.dtype | None = None,
        granularity: Granularity = "model",
        process_group: object = "auto",
        rows: Choice = "auto",
    ) -> None:
        if not isinstance(num_tasks, int) or num_tasks < 1:
            raise ValueError(f"num_tasks must be an integer >= 1; found {num_tasks!r}")
        if accumulate not in ("sum", "mean"):
            raise ValueError(f"accumulate must be 'sum' or 'mean'; found {accumulate!r}")
        self.num_tasks = num_tasks
        self.method = check_method(method, PCGrad)
        self.granularity = check_granularity(granularity)
        self.row_dtype, self.row_device = row_dtype, row_device
        self.accumulate, self.accumulate_dtype = accumulate, accumulate_dtype
        self.rows = check_rows(rows)
        self._processes = Processes(process_group)
        self._source = parameter_source(optimizer_or_params)
        self._shared = None if shared is None else check_tensors("shared", shared)
        self._stay: _Stay | None = None
        self._kept = _BY_CALLER
        self._layout = self._laid_out(self._trainable())

    @property
    def nbytes(self) -> int:
        """Bytes of T rows, whether or not they are there yet."""
        return self.num_tasks * self._layout.capture.rows.row_nbytes

    def task(self, index: int) -> AbstractContextManager[Any]:
        """A context in which gradients go into the row of task ``index``.

        Enter it again for further micro-batches of the same task: they add up. A task counts as present, with a
        zero gradient for what it did not touch, once it was entered and left without an exception.

        Raises:
            IndexError: not in 0..num_tasks-1.
            RuntimeError: inside another task, or the parameters changed since the round began.
            NotImplementedError: what would be wrong with several processes, see ``process_group``.
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
                tensors only. See ``fastpcgrad.merging.two_phase``.
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
        self._check_outside("backward()")
        if filled := self._layout.capture.rows.tasks:
            raise RuntimeError(f"backward() with rows of tasks {filled} filled: call merge() or discard() first")
        tensors, forwards = _check_round(losses, self.num_tasks)
        if two_phase:
            return self._in_two_phases(tensors, forwards, retain_graph)
        try:
            if forwards:
                self._run_forwards(forwards, retain_graph)
            else:
                self._run(tensors, retain_graph)
            return self.merge()
        except BaseException:
            self.discard()
            raise

    def memory_plan(self, *, two_phase: bool = False, rows: Choice = "dense") -> MemoryPlan:
        """Bytes that a round takes beyond model and activations, before anything is allocated.

        Every task counts with all parameters: an upper bound where some are touched by some tasks only.

        Args:
            two_phase: of ``backward(..., two_phase=True)``, as far as it is known before there is a graph: pieces may
                be somewhat larger, and what crosses from one to the next counts as activations.
            rows: ``factored``: where all matrices of the model are kept as factors, see ``rows`` of the class. Which
                are is known once there is a graph, so that the default counts them as rows.
        Warns:
            MemoryPlanWarning: more than is free.
        Example:
            >>> surgery = fastpcgrad.GradientSurgery(torch.nn.Linear(1000, 1000).parameters(), num_tasks=4)
            >>> surgery.memory_plan().device.rows
            16016000
        """
        layout = self._resolve()
        parameters, kept = _as_real(layout.capture.parameters), layout.capture.rows
        moved = kept if isinstance(kept, MovedGradients) else None
        if two_phase:
            plan = plan_two_phase(self.num_tasks, parameters)
        elif check_rows(rows) == "factored" and moved is None:
            plan = plan_factored(self.num_tasks, parameters)
        else:
            plan = plan_memory(
                self.num_tasks,
                parameters,
                kept.dtype,
                moved=moved is not None,
                accumulate_dtype=None if moved is None else moved.accumulate_dtype,
                on_host=moved is not None and moved.on_host,
                problems=len(parameters if self.method.scope == "parameter" else set(layout.division.groups or [0])),
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
        self._check_outside("merge()")
        layout = self._layout
        rows = layout.capture.rows
        if not rows.tasks:
            raise RuntimeError("merge() with no task: fill rows inside 'with surgery.task(t)' first")
        if self.accumulate == "mean":
            rows.average()
        report, merged = merge(rows, self.method, layout.division, in_place=True)
        report.rows = self._kept if rows.factors is None else rows.factors.report
        self._kept = _BY_CALLER
        layout.capture.give(merged)
        rows.clear()
        return report

    def discard(self) -> None:
        """Forget the rows of this round, as if no task had been there; ``.grad`` is as it was before the open task.

        Whatever an exception has cut off, an interrupt in a ``with`` line or in ``merge`` too, a round can begin anew
        afterwards. Within a task it ends that task, which raises when it is left.
        """
        if self._stay is not None:
            self._stay.leave()
        self._layout.capture.rows.clear()

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that have a gradient, with it."""
        return [(p, p.grad) for p in self._trainable() if p.grad is not None]

    def _last_merged(self) -> list[Tensor]:
        """What the last merge made, of the parameters that still have it in ``.grad``."""
        capture = self._layout.capture
        pairs = zip(capture.parameters, capture.last_merged(), strict=False)  # nothing of a round that failed
        return [merged for p, merged in pairs if merged is not None and p.grad is merged]

    def state_dict(self, *, global_generators: bool = False) -> dict[str, Any]:
        """What a run needs, besides model and optimizer, to go on with the same numbers. Between rounds.

        Args:
            global_generators: also the states of Python's, NumPy's and torch's global generators, from which methods
                without a generator of their own draw.
        Returns:
            ``method``: the method's ``state_dict``; ``generator``: the state of its own generator, None without one;
            if asked for ``global_generators``. Tensors, numbers, strings and containers of them alone.
        """
        state = {"method": self.method.state_dict(), "generator": state_of(self.method.generator)}
        return {**state, "global_generators": global_states()} if global_generators else state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave, the states of global generators too where it holds them.

        Raises:
            ValueError: other keys, the state of another method or of another kind of generator. The surgery is then as
                before.
        """
        keys = set(state_dict)
        if not {"method", "generator"} <= keys <= {"method", "generator", "global_generators"}:
            raise ValueError(
                "the state of a surgery has the keys method, generator and maybe global_generators; found "
                f"{sorted(keys)}"
            )
        before = state_of(self.method.generator)
        set_state(self.method.generator, state_dict["generator"])
        try:
            self.method.load_state_dict(state_dict["method"])
        except BaseException:
            set_state(self.method.generator, before)
            raise
        if "global_generators" in state_dict:
            set_global_states(state_dict["global_generators"])

    def __getstate__(self) -> dict[str, Any]:
        # The layout is made anew, for the copy's parameters and its process' memory; the rows of the round go along.
        self._check_outside("copy of the surgery")
        state = {name: value for name, value in self.__dict__.items() if name != "_layout"}
        return {**state, "_rows": self._layout.capture.rows.snapshot()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state.pop("_rows")
        self.__dict__.update(state)
        self._layout = self._laid_out(self._trainable())
        self._layout.capture.rows.restore(rows)

    def _check_outside(self, what: str) -> None:
        if self._stay is not None:
            raise RuntimeError(
                f"{what} inside task({self._layout.capture.task}): leave the task first; where an interrupt has cut it "
                "off, call discard()"
            )

    def _resolve(self) -> _Layout:
        """Look the trainable parameters up; lay the rows out anew where they changed."""
        layout, found = self._layout, self._trainable()
        filled = layout.capture.rows.tasks
        same = len(found) == len(layout.found) and all(map(is_, found, layout.found))
        if same and (filled or _kinds(found) == layout.kinds):
            return layout
        if filled:
            raise RuntimeError(
                f"the trainable parameters changed within a round ({len(layout.found)} before, {len(found)} now) "
                f"while rows of tasks {filled} are filled: call merge() or discard() first"
            )
        self._layout = self._laid_out(found)
        return self._layout

    def _trainable(self) -> list[Tensor]:
        return [p for group in self._source.param_groups for p in group["params"] if p.requires_grad]

    def _laid_out(self, found: list[Tensor]) -> _Layout:
        parameters = list({id(p): p for p in found if not is_lazy(p)}.values())
        check_parameters(parameters, self._shared, self.row_dtype)
        division = Division(
            shared=None if self._shared is None else are_among(parameters, self._shared),
            groups=problem_of_each(parameters, self.granularity, self._source.param_groups, self._shared),
        )
        lazy = any(map(is_lazy, found))
        return _Layout(found, _kinds(found), division, self._capture_for(parameters), lazy, is_large(parameters))

    def _capture_for(self, parameters: Sequence[Tensor]) -> Capture:
        """Of rows as autograd leaves them, or of such that are converted or sent away."""
        real = _as_real(parameters)
        plain = TaskGradients(real, self.row_dtype)
        copies = host.copies_for(plain.device, self.row_device)
        sums = self.accumulate_dtype
        if sums is not None:
            check_accumulate_dtype(sums, plain.dtype)
            if sums == plain.dtype and copies is None:  # the rows themselves will do
                sums = None
        if copies is None and sums is None and all(gradient_dtype(p) == plain.dtype for p in real):
            return Capture(parameters, plain)
        return MovedCapture(parameters, MovedGradients(real, plain.dtype, sums, copies))

    def _run(self, losses: Mapping[int, Tensor], retain_graph: bool) -> None:
        """Each loss backward inside its task; only the last pass frees what graphs they share."""
        left = len(losses)
        if left > 1 or retain_graph:
            check_kept(list(losses.values()))
        with _Stay(self, shared_forward=left > 1) as capture:
            factors = self._planned(losses, capture)
            if factors is not None:
                _run_factored(losses, retain_graph, capture, factors)
                return
            for index, loss in losses.items():
                left -= 1
                capture.open(index)
                run_backward(loss, retain_graph or left > 0)
                capture.close()

    def _planned(self, losses: Mapping[int, Tensor], capture: Capture) -> Factors | None:
        """How weights' gradients are kept as factors; None where all rows are to be whole."""
        if self.rows == "auto" and not self._layout.is_large:
            self._kept = _SMALL
            return None
        if isinstance(capture, MovedCapture):
            self._kept = all_dense("rows of another dtype or on another device", len(capture.parameters))
            return None
        found = planned(losses, capture.parameters, self.method, self.rows)
        if isinstance(found, Factors):
            return found
        self._kept = found
        return None

    def _in_two_phases(
        self, losses: dict[int, Tensor], forwards: dict[int, Forward], retain_graph: bool
    ) -> ConflictReport:
        if forwards:
            raise TypeError(f"two_phase needs losses, not functions; found functions for tasks {list(forwards)}")
        if self.granularity != "model":
            raise ValueError(f"two_phase solves one problem; found granularity={self.granularity!r}")
        layout = self._resolve()
        capture = layout.capture
        if isinstance(capture, MovedCapture):
            raise ValueError(
                "two_phase keeps no rows: leave row_dtype, row_device and accumulate_dtype None; found "
                f"{self.row_dtype}, {self.row_device}, {self.accumulate_dtype}"
            )
        capture.rows.free()
        with _Stay(self, shared_forward=True):
            report, merged = merge_in_two_phases(
                list(losses.values()),
                capture.parameters,
                self.method,
                tasks=list(losses),
                division=layout.division,
                retain_graph=retain_graph,
            )
        capture.give(merged)
        return report

    def _run_forwards(self, forwards: dict[int, Forward], retain_graph: bool) -> None:
        """Each forward, and its loss backward, inside its task."""
        with _Stay(self, forward=True) as capture:
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


def _run_factored(losses: Mapping[int, Tensor], retain_graph: bool, capture: Capture, factors: Factors) -> None:
    """Each loss backward inside its task, but not to the weights; together from where the tasks meet, if they may."""
    trunk = find_trunk(factors)
    factors.why_looped = trunk if isinstance(trunk, str) else may_stack(factors, trunk)
    if isinstance(trunk, Trunk) and factors.why_looped is None:
        rows = run_stacked(factors, trunk, list(losses.values()), retain_graph)
        for index in losses:
            capture.rows.take(index)
            capture.rows.keep(index, rows.pop(0))
    else:
        _run_looped(losses, retain_graph, capture, factors, Trial.of(factors, trunk))
    capture.rows.factors = factors


def _run_looped(
    losses: Mapping[int, Tensor], retain_graph: bool, capture: Capture, factors: Factors, trial: Trial | None
) -> None:
    parameters, left = capture.parameters, len(losses)
    with factors.noting(), nullcontext() if trial is None else trial.watching():
        for slot, (index, loss) in enumerate(losses.items()):
            left -= 1
            if trial is not None and left == 0:
                trial.finish([capture.rows.row(before) for before in capture.rows.tasks])
            capture.open(index)
            run_backward(loss, retain_graph or left > 0, factors.begin(slot))
            for done in factors.compare([parameters[unknown].grad for unknown in factors.unknown]):
                parameters[done].grad = None
            capture.close()


class _Stay:
    """A stay inside tasks, one after the other. Gradients that were there before come back at the end.

    From the first change on the surgery knows of it, so that whatever an exception cuts off can be put right.

    Args:
        forward: whether forward passes run inside.
        shared_forward: whether several backward passes do, maybe of one forward.
    """

    def __init__(self, surgery: GradientSurgery, *, forward: bool = False, shared_forward: bool = False) -> None:
        self._surgery, self._forward, self._shared_forward = surgery, forward, shared_forward

    def __enter__(self) -> Capture:
        layout = self._surgery._resolve()
        if layout.lazy and self._forward:
            raise RuntimeError(
                "a forward pass inside a task would give lazy parameters a shape, which then are in no row: run one "
                "before the first task"
            )
        capture = layout.capture
        processes = self._surgery._processes
        processes.check(capture.parameters, moved=isinstance(capture, MovedCapture))
        if self._shared_forward:
            processes.check_shared_forward("a call with several losses")
        self._capture = capture
        self._aside = self._capture.aside()
        self._surgery._stay = self
        self._capture.enter()
        return self._capture

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._surgery._stay is self:
            self.leave()
        if error is not None:
            explain(error)

    def leave(self) -> None:
        """End it. A task that is open is absent unless it is opened again: what there is is no whole gradient."""
        self._capture.leave(self._aside)
        self._surgery._stay = None


class _Task(_Stay):
    """A stay inside one task."""

    def __init__(self, surgery: GradientSurgery, index: int) -> None:
        super().__init__(surgery, forward=True)
        self._index = index

    def __enter__(self) -> Capture:
        self._surgery._check_outside(f"task({self._index})")
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
        if kind is None and self._surgery._stay is not self:
            raise RuntimeError(f"discard() inside task({self._index}) has ended it: what came later is in no row")
        try:
            if kind is None:
                self._capture.close()
        finally:
            super().__exit__(kind, error, trace)


def _as_real(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """With the shapes, strides and dtypes that their rows have."""
    return [as_real(p.detach()) if p.is_complex() else p for p in parameters]


def _kinds(found: Sequence[Tensor]) -> Sequence[tuple[Any, ...] | None]:
    try:
        return list(map(_KIND, found))
    except RuntimeError:  # a lazy one has no shape, and one that is no leaf no grad_dtype
        return [None if is_lazy(p) else (p.dtype, p.device, p.shape, gradient_dtype(p)) for p in found]


def _check_round(
    losses: Sequence[Forward | None] | Sequence[Tensor | None] | Tensor, tasks: int
) -> tuple[dict[int, Tensor], dict[int, Forward]]:
    """Losses, or functions that give them, by the index of their task; without those that are absent."""
    if isinstance(losses, Tensor):
        present = present_losses(losses)
        _check_count(losses.numel(), tasks)
        return present, {}
    if not isinstance(losses, Iterable):
        raise TypeError(f"losses must be a sequence of functions or scalar tensors; found {type(losses).__name__}")
    given: list[Any] = list(losses)
    _check_count(len(given), tasks)
    functions = {t: loss for t, loss in enumerate(given) if callable(loss)}
    others = {t: loss for t, loss in enumerate(given) if loss is not None and t not in functions}
    if functions and not others:
        return {}, functions
    for t, loss in others.items() if functions else ():
        if isinstance(loss, Tensor):
            raise TypeError(
                f"losses must be all functions or all tensors; found tasks {list(functions)} with functions"
            )
        check_loss(f"losses[{t}]", loss)
    return present_losses(given), {}


def _check_count(found: int, tasks: int) -> None:
    if found != tasks:
        raise ValueError(f"losses must hold one for each of the {tasks} tasks, None for one absent; found {found}")
