"""GradientSurgery: one task at a time into its row, then one merged gradient."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter, is_
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from .functional import check_tensors
from .merging import merge
from .methods import Method, PCGrad, check_method
from .report import ConflictReport
from .task_gradients import Row, TaskGradients

_GRAD, _KIND = attrgetter("grad"), attrgetter("dtype", "device", "shape")

Granularity = Literal["model", "group", "parameter"]


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
        row_device: None; rows lie where the parameters are.
        granularity: ``model``: one surgery over all parameters. ``group`` or ``parameter``: one for each parameter
            group, or for each parameter. A method whose original works on each parameter does so anyway.
        process_group: None; distributed training is not covered by this version.
    Memory: T rows of N elements, where N counts the trainable parameters: T·N·itemsize bytes, of which one row becomes
        ``.grad``. On the CPU they stay mapped until the next round's gradients take their place, one by one.
    Raises:
        TypeError: parameters that are no tensors, or of a dtype that rows cannot have.
        ValueError: no parameters, parameters that are no leaves, on several devices or of several dtypes.
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
        granularity: Granularity = "model",
        process_group: object | None = None,
    ) -> None:
        if not isinstance(num_tasks, int) or num_tasks < 1:
            raise ValueError(f"num_tasks must be an integer >= 1; found {num_tasks!r}")
        if granularity not in ("model", "group", "parameter"):
            raise ValueError(f"granularity must be 'model', 'group' or 'parameter'; found {granularity!r}")
        if row_device is not None:
            raise NotImplementedError(f"rows lie on the parameters' device; found row_device={row_device!r}")
        if process_group is not None:
            raise NotImplementedError("this version does not reduce gradients over processes: process_group=None")
        self.num_tasks = num_tasks
        self.method = check_method(method, PCGrad)
        self.granularity = granularity
        self.row_dtype = row_dtype
        self._source = _parameter_source(optimizer_or_params)
        self._shared = None if shared is None else {id(p): p for p in check_tensors("shared", shared)}
        self._found: list[Tensor] = []
        self._kinds: list[tuple[torch.dtype, torch.device, torch.Size]] = []
        self._problems: list[int] | None = None
        self._parameters: list[Tensor] = []
        self._grads: TaskGradients | None = None
        self._hooks = _Hooks(self)
        self._merged: Row = []
        self._inside: _Tasks | None = None
        self._resolve()

    @property
    def nbytes(self) -> int:
        """Bytes of T rows, whether or not they are there yet."""
        return self.num_tasks * self._rows_now().row_nbytes

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

    def merge(self) -> ConflictReport:
        """Merge the rows of this round into ``.grad``.

        Tasks that were absent take no part. A parameter that no task touched gets ``.grad = None``.

        Returns:
            what conflicted and what became of it.
        Raises:
            RuntimeError: no task was there, or inside a task. Nothing is changed.
        """
        grads = self._rows_now()
        if self._inside is not None:
            raise RuntimeError(f"merge() inside task({self._inside.index}): leave the task first")
        if not grads.tasks:
            raise RuntimeError("merge() with no task: fill rows inside 'with surgery.task(t)' first")
        shared = None if self._shared is None else [id(p) in self._shared for p in self._parameters]
        report, merged = merge(grads, self.method, shared, self._problems, in_place=True)
        if self._hooks.attached:  # the rows have another dtype than the parameters
            merged = [m if m is None else m.to(p.dtype) for p, m in zip(self._parameters, merged, strict=True)]
        for p, own in zip(self._parameters, merged, strict=True):
            p.grad = own
        self._merged = merged
        grads.clear()
        return report

    def discard(self) -> None:
        """Forget the rows of this round, as if no task had been there; ``.grad`` stays as it is.

        Raises:
            RuntimeError: inside a task.
        """
        if self._inside is not None:
            raise RuntimeError(f"discard() inside task({self._inside.index}): leave the task first")
        self._rows_now().clear()

    def _rows_now(self) -> TaskGradients:
        assert self._grads is not None
        return self._grads

    def _resolve(self) -> None:
        """Look the trainable parameters up; lay the rows out anew where they changed."""
        found = [p for group in self._source.param_groups for p in group["params"] if p.requires_grad]
        same = self._grads is not None and len(found) == len(self._found) and all(map(is_, found, self._found))
        if same and (self._rows_now().tasks or list(map(_KIND, found)) == self._kinds):
            return
        if self._grads is not None and self._grads.tasks:
            raise RuntimeError(
                f"the trainable parameters changed within a round ({len(self._found)} before, {len(found)} now) "
                f"while rows of tasks {self._grads.tasks} are filled: call merge() or discard() first"
            )
        parameters = list({id(p): p for p in found}.values())
        _check_parameters(parameters, self._shared, self.row_dtype)
        self._grads = TaskGradients(parameters, self.row_dtype)
        self._found, self._parameters, self._merged = found, parameters, []
        self._kinds = list(map(_KIND, found))
        self._problems = self._problem_of_each()
        converted = any(p.dtype != self._grads.dtype for p in parameters)
        self._hooks.attach(parameters if converted else [])

    def _problem_of_each(self) -> list[int] | None:
        if self.granularity == "model":
            return None
        if self.granularity == "parameter":
            return list(range(len(self._parameters)))
        owner = {id(p): g for g, group in enumerate(self._source.param_groups) for p in group["params"]}
        return [owner[id(p)] for p in self._parameters]

    def _release_merged(self) -> None:
        """Drop the last merged gradient where it is still ``.grad``: its memory is for the next rows."""
        for p, merged in zip(self._parameters, self._merged, strict=True):
            if merged is not None and p.grad is merged:
                p.grad = None
        self._merged = []

    def _run(self, losses: Sequence[Tensor], retain_graph: bool) -> None:
        """Each loss backward inside its task; only the last pass frees what graphs they share."""
        last = len(losses) - 1
        with _Tasks(self) as tasks:
            for t, loss in enumerate(losses):
                tasks.open(t)
                loss.backward(retain_graph=retain_graph or t < last)
                tasks.close()


class _Tasks:
    """A stay inside tasks, one after the other. Gradients that were there before come back at the end."""

    def __init__(self, surgery: GradientSurgery) -> None:
        self.index = -1
        self._surgery = surgery
        self._row: Row = []
        self._aside: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> _Tasks:
        surgery = self._surgery
        surgery._resolve()
        if surgery._merged:
            surgery._release_merged()
        surgery._inside = self
        self._aside = [(p, p.grad) for p in surgery._parameters if p.grad is not None]
        self._clear()
        return self

    def open(self, index: int) -> None:
        """From here on gradients are those of task ``index``."""
        surgery = self._surgery
        self.index = index
        row = surgery._rows_now().take(index)
        if surgery._hooks.attached:
            self._row = row or [None] * len(surgery._parameters)
        elif row is not None:  # autograd adds to what is there
            for p, grad in zip(surgery._parameters, row, strict=True):
                p.grad = grad

    def close(self) -> None:
        """What there is of the task's gradients is its row."""
        surgery = self._surgery
        if surgery._hooks.attached:
            for index, p in enumerate(surgery._parameters):
                self.convert(index, p)
        else:
            self._row = list(map(_GRAD, surgery._parameters))
            self._clear()
        surgery._rows_now().put(self.index, self._row)

    def convert(self, index: int, parameter: Tensor) -> None:
        """A hook's call: this parameter's gradient is complete; add it to the row, in the row's dtype."""
        if parameter.grad is not None:
            self._surgery._rows_now().add(self._row, index, parameter.grad)
            parameter.grad = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._surgery._inside = None
        if kind is not None:  # what there is is no whole gradient: the open task is absent unless it is opened again
            self._clear()
        for p, grad in self._aside:
            p.grad = grad

    def _clear(self) -> None:
        for p in self._surgery._parameters:
            p.grad = None


class _Task(_Tasks):
    """A stay inside one task."""

    def __init__(self, surgery: GradientSurgery, index: int) -> None:
        super().__init__(surgery)
        self.index = index

    def __enter__(self) -> _Task:
        if (other := self._surgery._inside) is not None:
            raise RuntimeError(f"task({self.index}) inside task({other.index}): tasks do not nest")
        super().__enter__()
        self.open(self.index)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            super().__exit__(kind, error, trace)


class _Hooks:
    """Converts gradients to the dtype of the rows as soon as autograd has them, so that they are not all there at once.

    The hooks hold the surgery weakly: they must not keep its rows alive as long as the model lives.
    """

    def __init__(self, surgery: GradientSurgery) -> None:
        self._surgery = weakref.ref(surgery)
        self._handles: list[Any] = []
        weakref.finalize(surgery, _remove, self._handles)

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self, parameters: Sequence[Tensor]) -> None:
        _remove(self._handles)
        for index, p in enumerate(parameters):
            self._handles.append(p.register_post_accumulate_grad_hook(self._hook(index)))

    def _hook(self, index: int) -> Any:
        reference = self._surgery

        def convert(parameter: Tensor) -> None:
            surgery = reference()
            if surgery is not None and surgery._inside is not None:
                surgery._inside.convert(index, parameter)

        return convert


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class _Groups:
    """Parameters that were given without an optimizer."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.param_groups = param_groups


def _parameter_source(source: torch.optim.Optimizer | Iterable[Any]) -> torch.optim.Optimizer | _Groups:
    """What has ``param_groups``: an optimizer, which is asked anew each round, or groups made of parameters."""
    if isinstance(source, torch.optim.Optimizer):
        return source
    values = [] if isinstance(source, Tensor) or not isinstance(source, Iterable) else list(source)
    if values and all(isinstance(value, dict) for value in values):
        groups = values
    else:
        groups = [{"params": check_tensors("optimizer_or_params", values or source)}]
    for group in groups:
        if "params" not in group:
            raise ValueError(f"a parameter group must have 'params'; found keys {sorted(group)}")
    groups = [{"params": check_tensors("params", _as_list(group["params"]))} for group in groups]
    if not any(group["params"] for group in groups):
        raise ValueError("optimizer_or_params holds no parameters")
    return _Groups(groups)


def _as_list(params: Any) -> Any:
    """A group may hold a single tensor, as optimizers allow."""
    return [params] if isinstance(params, Tensor) else params


def _check_parameters(
    parameters: Sequence[Tensor], shared: dict[int, Tensor] | None, row_dtype: torch.dtype | None
) -> None:
    for p in parameters:
        if not p.is_leaf:
            raise ValueError(f"parameters must be leaves of the graph; found {list(p.shape)} with {p.grad_fn}")
    dtypes = sorted({str(p.dtype) for p in parameters})
    if len(dtypes) > 1 and row_dtype is None:
        raise ValueError(
            f"parameters have several dtypes ({', '.join(dtypes)}); choose one for the rows with row_dtype"
        )
    known = {id(p) for p in parameters}
    for p in (shared or {}).values():
        if p.requires_grad and id(p) not in known:
            raise ValueError(f"shared holds a tensor {list(p.shape)} that is none of the parameters")
