"""GradientSurgery: one task at a time into its row, then one merged gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._checkpoints import load_surgery_state, surgery_state
from ._losses import Forward, check_loss, check_round
from ._modes import not_compiled
from ._tasks import check_tasks, in_order, index_of
from .distributed.groups import Processes
from .merging.by_factors import planned
from .merging.by_rows import merge
from .merging.problems import check_scopes
from .merging.report import ConflictReport
from .merging.small_round import SmallRound
from .merging.two_phase import check_no_rows, check_one_problem, merge_in_two_phases
from .methods import Method, PCGrad, check_method
from .rows.capture import Capture, MovedCapture
from .rows.choice import BY_CALLER, SMALL, Choice, check_rows
from .rows.departures import Overlap, check_overlap
from .rows.factored_round import run_factored
from .rows.factors import Factors, all_dense
from .rows.layout import Layouts, RowChoice
from .rows.memory_plan import MemoryPlan
from .rows.parameters import Granularity, HasGroups, Scope, Scopes, check_granularity, parameter_source
from .rows.stays import Stay, Stays, Task


class GradientSurgery:
    """Takes each task's gradient as its row of J, then merges the rows into ``.grad``.

    Inside ``task(t)`` gradients collect in ``.grad`` as ever; several backward passes of one task add up. Leaving it
    takes them away as row t, without a copy. Each task's graph can be freed before the next task's forward. ``merge``
    replaces ``.grad`` of every parameter that takes part: it is written over one of the rows.

    Args:
        optimizer_or_params: an optimizer (or what has its ``param_groups``), or parameters (or dicts of them, as
            optimizers take). An optimizer's are looked up at each round, so that ones added, frozen or unfrozen later
            are seen; lazy ones, once they have a shape. Gradients of complex ones are rows of both their parts.
        num_tasks: T; or ``tasks``.
        method: makes weights of the Gram matrix; None: ``methods.PCGrad()``.
        shared: the parameters that undergo surgery; the others' gradients are summed. ``auto``: those with gradients
            other than zeros of two tasks so far; the first round needs all. None: as its original has it (mostly all).
        gram_over: those of them whose gradients G is made of, or ``auto``; the weights reach all the same. None: all of
            them. With the trunk here a method weighs the losses of the heads as those of the trunk. Each problem needs
            one of them; for methods that see all parameters through one G a problem.
        row_dtype: dtype of the rows; None: that of each parameter. bfloat16 halves the memory.
        row_device: ``"cpu"``: parameters on a CUDA device have their rows in page-locked host memory; each gradient
            is sent there as soon as autograd has it, and the surgery runs on the host. The report is there too. A
            gradient must not be overwritten before its task is left. None: where the parameters are.
        accumulate: ``sum``: all that a task's stays bring adds up. ``mean``: that is divided by how many stays there
            were, so that tasks of any number of micro-batches count alike. Backward passes within one stay add up.
        accumulate_dtype: dtype in which gradients within one stay add up, on the parameters' device, before they are
            rounded to the rows'; each further stay widens, adds and rounds once more. None: the rows' own.
        tasks: their names, in the order of their indices, or T. What takes an index takes a name, what takes a list
            of losses a dict, and the report has them.
        granularity: ``model``: one surgery over all parameters. ``group`` or ``parameter``: one for each parameter
            group, or for each parameter. ``layer``: one for each block of the model, the nearest of a ``ModuleList``
            or ``Sequential`` that a parameter lies in, and for each other module. Collections of parameters: one for
            each. All in one pass. A method whose original works on each parameter does so anyway.
        model: whose layers are meant, by its ``named_parameters``; the report has their names.
        process_group: whose parts of a batch, or of the parameters, form one; see docs/distributed.md. Parameters that
            are DTensors have the processes of their meshes. Of others, ``auto``: rows are means over the processes
            over which DistributedDataParallel averages the parameters' gradients, as it is found in the first round;
            where there is none in several processes, each merges by itself, with one warning. A process group or a
            mesh of one dimension: means over that. ``local``: each process merges by itself, what it finds in
            ``.grad``.
        parallel: ``data``: each process has its part of every task's batch. ``task``: it has tasks of its own, any of
            them, and enters no others; those of a process group, of the module that holds the parameters, or else all
            processes merge together. A task that several enter is the mean over these, or with ``accumulate="mean"``
            over all stays. A process without any calls ``merge``, too, or gives None for each loss.
        rows: how ``backward`` of losses that share a graph keeps the gradients of weights that matrix products alone
            use, and of tables that lookups alone use. ``factored``: of each task only what comes into these, from which
            G and the merged gradient are made without the tasks' own. ``auto``: so where that takes less time, in
            models on a CPU with a million elements in such weights or more, in one process. ``dense``: as they are.
            Everything else is kept as it is in either case, and what cannot be had exactly from factors too:
            ``report.rows`` says what was done and why. ``fastpcgrad.dense_rows()`` and ``FASTPCGRAD_ROWS=dense`` switch
            it off.
        overlap: of means over processes, whether a task's gradients are reduced while its backward pass runs. ``auto``:
            in passes that ``backward`` runs, of parameters on a CPU. True: also on a GPU, and in passes of one's own
            inside ``task(t)``, where what is written into a ``.grad`` after that has left is found as far as torch
            counts it, as it does not through ``.data``, NumPy or DLPack. False: when the task is left.
    Memory: T rows of N elements, where N counts the trainable parameters: T·N·itemsize bytes, of which one row becomes
        ``.grad``. On the CPU they stay mapped until the next round's gradients take their place, one by one. Rows of
        another dtype than the parameters are freed parameter by parameter as merged gradients take their place.
        Weights that are kept as factors take N elements instead of T·N, besides T gradients of activations.
        ``memory_plan`` tells the bytes beforehand. Sparse gradients stay so: of these N counts what some task touched.
    Numerics: G and merged gradients from factors have the rounding errors of matrix products, G in float64; their bits
        may differ from those with dense rows, and with the number of threads, as those of torch's products do.
    Many processes: unless they share tasks out, all must enter the same in the same order; one that fails ends the
        round of all. Rows of DTensors are their local tensors. Rows of others lie in shards, T·N/p elements in each of
        p processes: means are reduced as each task is left, by (T + 1)·N·(p - 1)/p elements in all; rows of a process'
        own tasks are kept, and exchanged in ``merge``, (k + 1)·N·(p - 1)/p for k of them. G is summed, and the first
        process' answer counts. ``backward`` of losses passes by what watches a backward pass, such as hooks on
        ``.grad``. Parameters beside DTensors must have the same gradients in all processes. ``repr`` says what was
        found.
    Raises:
        TypeError: parameters that are no tensors, or of a dtype that rows cannot have.
        ValueError: no parameters, parameters that are no leaves; a parameter in two or in none of the collections of
            ``granularity``; ``gram_over`` beyond ``shared``, empty, or with a method that has no G over several
            parameters; rows that cannot have that device, or sums that cannot have that dtype.
    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> surgery = fastpcgrad.GradientSurgery(model.parameters(), num_tasks=2)
        >>> for t in range(2):
        ...     with surgery.task(t):
        ...         model(torch.randn(8, 4))[:, t].square().mean().backward()
        >>> report = surgery.merge()
    """

    def __init__(
        self,
        optimizer_or_params: HasGroups | Iterable[Any],
        num_tasks: int | None = None,
        method: Method | None = None,
        *,
        tasks: Sequence[str] | int | None = None,
        shared: Scope = None,
        gram_over: Scope = None,
        row_dtype: torch.dtype | None = None,
        row_device: torch.device | str | None = None,
        accumulate: Literal["sum", "mean"] = "sum",
        accumulate_dtype: torch.dtype | None = None,
        granularity: Granularity = "model",
        model: nn.Module | None = None,
        process_group: object = "auto",
        parallel: Literal["data", "task"] = "data",
        rows: Choice = "auto",
        overlap: Overlap = "auto",
    ) -> None:
        if accumulate not in ("sum", "mean"):
            raise ValueError(f"accumulate must be 'sum' or 'mean'; found {accumulate!r}")
        self.num_tasks, self.tasks = check_tasks(num_tasks, tasks)
        self.method = check_method(method, PCGrad)
        self.granularity = check_granularity(granularity, model)
        self.row_dtype, self.row_device = row_dtype, row_device
        self.accumulate, self.accumulate_dtype = accumulate, accumulate_dtype
        self.rows, self._kept = check_rows(rows), BY_CALLER
        processes, source = Processes(process_group, parallel), parameter_source(optimizer_or_params)
        scopes = Scopes.of(shared, gram_over)
        check_scopes(self.method, scopes.gram_over)
        kept = RowChoice(row_dtype, row_device, accumulate_dtype, processes.by_task, check_overlap(overlap))
        self._layouts = Layouts(source, scopes, self.granularity, kept)
        self._stays = Stays(self._layouts, processes)
        self._small = SmallRound(self._stays)

    @property
    def nbytes(self) -> int:
        """Bytes of T rows, whether or not they are there yet."""
        return self.num_tasks * self._layouts.current.capture.rows.row_nbytes

    def task(self, task: int | str) -> AbstractContextManager[Any]:
        """A context in which gradients go into the row of a task, by its index or its name.

        Enter it again for further micro-batches of the same task: they add up. A task counts as present, with a
        zero gradient for what it did not touch, once it was entered and left without an exception.

        Raises:
            IndexError: not in 0..num_tasks-1, and no name.
            RuntimeError: inside another task, or the parameters changed since the round began.
            NotImplementedError: what would be wrong with several processes, see ``process_group``.
        """
        return Task(self._stays, index_of(task, self.num_tasks, self.tasks))

    @not_compiled
    def backward(
        self,
        losses: Sequence[Forward | None] | Sequence[Tensor | None] | Mapping[Any, Any] | Tensor,
        *,
        retain_graph: bool = False,
        two_phase: bool = False,
    ) -> ConflictReport:
        """A whole round: run each task's loss backward inside its task, then ``merge``.

        Args:
            losses: one for each task, None for one that is absent. Functions run their own forward and return the
                scalar loss, or None; each graph is freed before the next forward. Or scalar tensors, or one tensor
                ``[T]``, which may share a graph. A dict has them by their tasks' names; one that it lacks is absent.
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
        self._stays.check_outside("backward()")
        if filled := self._layouts.current.capture.rows.tasks:
            raise RuntimeError(f"backward() with rows of tasks {filled} filled: call merge() or discard() first")
        with self._stays.telling():
            ordered = in_order(losses, self.num_tasks, self.tasks)
            tensors, forwards = check_round(ordered, self.num_tasks, may_be_none=self._stays.processes.by_task)
        if two_phase:
            return self._in_two_phases(tensors, forwards, retain_graph)
        try:
            if forwards:
                self._run_forwards(forwards, retain_graph)
                return self.merge()
            return self._round(tensors, retain_graph)
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
        plan = self._stays.resolve().memory_plan(
            self.num_tasks, check_rows(rows), two_phase=two_phase, by_parameter=self.method.scope == "parameter"
        )
        plan.warn()
        return plan

    @not_compiled
    def merge(self) -> ConflictReport:
        """Merge the rows of this round into ``.grad``.

        Tasks that were absent take no part. A parameter that no task touched gets ``.grad = None``.

        Returns:
            what conflicted and what became of it.
        Raises:
            RuntimeError: no task was there, or inside a task; another process that shares parameters has failed, is
                elsewhere in its round, or gone. Nothing is changed.
            torch.OutOfMemoryError: no room to convert the merged gradient or to send it back. The round is over, and
                ``.grad`` is None.
        """
        self._stays.check_outside("merge()")
        rows = self._stays.collect(self.method, self.num_tasks, self.accumulate == "mean")
        layout = self._layouts.current
        own, exchange = layout.capture.parameters, layout.exchange
        report, merged = merge(rows, self.method, layout.division, in_place=True, exchange=exchange, parameters=own)
        report.rows = self._kept if rows.factors is None else rows.factors.report
        self._kept = BY_CALLER
        report.names = self.tasks
        layout.capture.give(merged)
        self._stays.end_round()
        return report

    def discard(self) -> None:
        """Forget the rows of this round, as if no task had been there; ``.grad`` is as it was before the open task.

        Whatever an exception has cut off, an interrupt in a ``with`` line or in ``merge`` too, a round can begin anew
        afterwards. Within a task it ends that task, which raises when it is left.
        """
        self._stays.discard()

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that have a gradient, with it."""
        return [(p, p.grad) for p in self._layouts.trainable() if p.grad is not None]

    def _last_merged(self) -> list[Tensor]:
        """What the last merge made, of the parameters that still have it in ``.grad``."""
        capture = self._layouts.current.capture
        pairs = zip(capture.parameters, capture.last_merged(), strict=False)  # nothing of a round that failed
        return [merged for p, merged in pairs if merged is not None and p.grad is merged]

    def state_dict(self, *, global_generators: bool = False) -> dict[str, Any]:
        """What a run needs, besides model and optimizer, to go on with the same numbers. Between rounds.

        Args:
            global_generators: also the states of Python's, NumPy's and torch's global generators, from which methods
                without a generator of their own draw.
        Returns:
            ``method``: the method's ``state_dict``; ``generator``: the state of its own generator, None without one;
            ``reach`` with 'auto'; ``tasks`` where they have names; ``global_generators`` if asked for.
        """
        return surgery_state(self.method, self.tasks, *self._layouts.learned, global_generators=global_generators)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave, the states of global generators too where it holds them.

        Raises:
            ValueError: other keys, other names of tasks or in another order, the state of another method or of another
                kind of generator. The surgery is then as before.
        """
        load_surgery_state(self.method, self.tasks, *self._layouts.learned, state_dict)

    def __repr__(self) -> str:
        exchange, tasks = self._layouts.current.exchange, self.num_tasks
        found = "" if exchange is None else f", {exchange}"
        return f"{type(self).__name__}(num_tasks={tasks}, method={self.method!r}, {self._stays.processes}{found})"

    def __getstate__(self) -> dict[str, Any]:
        self._stays.check_outside("copy of the surgery")
        state = {name: value for name, value in self.__dict__.items() if name not in ("_layouts", "_stays", "_small")}
        return {**state, "layouts": self._layouts.snapshot(), "processes": self._stays.processes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layouts = Layouts.restored(state.pop("layouts"))
        self._stays = Stays(self._layouts, state.pop("processes"))
        self._small = SmallRound(self._stays)
        self.__dict__.update(state)

    def _round(self, losses: Mapping[int, Tensor], retain_graph: bool, is_small: bool = False) -> ConflictReport:
        """Each loss backward inside its task, and the merge; it may be known to be a ``SmallRound``."""
        if not (is_small or self._small.takes(losses.values(), self.method, self.rows)):
            self._run(losses, retain_graph)
            self._small.note(losses, self.method)
        elif (report := self._small.run(losses, retain_graph, self.method, self.tasks)) is not None:
            return report
        else:
            self._kept = SMALL
        return self.merge()

    def _add(self, losses: Mapping[int, Tensor], retain_graph: bool) -> None:
        """Each loss backward inside its task, without the merge: one micro-batch of several."""
        self._stays.check_outside("backward()")
        self._run(losses, retain_graph, is_all=False)

    def _run(self, losses: Mapping[int, Tensor], retain_graph: bool, *, is_all: bool = True) -> None:
        """Each loss backward inside its task; only the last pass frees what they share. ``is_all``: of the round."""
        left = len(losses)
        with self._stays.telling():
            is_known = is_all and not self._stays.processes.by_task
            self._stays.look(losses, are_kept=left > 1 or retain_graph, tasks=self.num_tasks if is_known else 0)
        with Stay(self._stays, losses=left) as capture:
            self._stays.meet("losses of tasks", *losses)
            factors = self._planned(losses, capture) if is_all else None
            if factors is not None:
                run_factored(losses, retain_graph, capture, factors)
                return
            for index, loss in losses.items():
                left -= 1
                self._stays.meet("task", index)
                capture.open(index)
                capture.run(loss, retain_graph or left > 0)
                capture.close()
                if self.method.needs_losses:
                    capture.rows.note_loss(index, loss)

    def _planned(self, losses: Mapping[int, Tensor], capture: Capture) -> Factors | None:
        """How weights' gradients are kept as factors; None where all rows are to be whole."""
        if self.rows != "factored" and not self._layouts.current.is_large:
            self._kept = SMALL
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
        layout = self._stays.resolve()
        capture = layout.capture
        check_one_problem(forwards, self.granularity)
        check_no_rows(layout, self.row_dtype, self.row_device, self.accumulate_dtype)
        capture.rows.free()
        self._stays.look(losses, tasks=self.num_tasks)
        with Stay(self._stays, losses=len(losses)):
            report, merged = merge_in_two_phases(
                list(losses.values()),
                capture.parameters,
                self.method,
                tasks=list(losses),
                division=layout.division,
                retain_graph=retain_graph,
            )
        report.names = self.tasks
        capture.give(merged)
        return report

    def _run_forwards(self, forwards: dict[int, Forward], retain_graph: bool) -> None:
        """Each forward, and its loss backward, inside its task."""
        with Stay(self._stays, forward=True, losses=len(forwards)) as capture:
            self._stays.meet("functions of tasks", *forwards)
            for index, forward in forwards.items():
                self._stays.meet("task", index, *capture.rows.tasks)
                capture.open(index)
                loss = forward()
                if loss is None:
                    if capture.drop():
                        raise RuntimeError(
                            f"losses[{index}]() returned None, which says that the task is absent, but left gradients: "
                            "let it return the loss, without running it backward"
                        )
                    continue
                capture.run(check_loss(f"losses[{index}]()", loss), retain_graph)
                if self.method.needs_losses:
                    capture.rows.note_loss(index, loss)
                del loss  # and with it the graph, before the next forward
                capture.close()
