"""The parameters of a surgery and the rows that their gradients become, looked up anew at each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._gradients import gradient_dtype
from ..distributed.exchange import Exchange
from ..distributed.links import Lanes
from ..distributed.local_tensors import LocalTensor, Part, is_dtensor, reducers_of
from . import host
from .capture import Capture, MovedCapture
from .choice import Choice, is_large
from .departures import Overlap, may_overlap
from .exchanged import ExchangedGradients
from .forms import Complex, Form
from .memory_plan import MemoryPlan, plan_factored, plan_memory, plan_two_phase
from .moved import MovedGradients, check_accumulate_dtype
from .parameters import (
    CheckedGranularity,
    Division,
    HasGroups,
    Learning,
    Scopes,
    check_leaves,
    divide,
)
from .reach import Reach
from .sharded import ShardedGradients
from .sharded_capture import ShardedCapture
from .task_gradients import TaskGradients

_PARAMETERS = itemgetter("params")
_LOOKED_AT = ("dtype", "device", "shape", *(("grad_dtype",) if hasattr(Tensor, "grad_dtype") else ()))
_KIND, _SEEN = attrgetter(*_LOOKED_AT), attrgetter("requires_grad", "is_cpu")


class Layout(NamedTuple):
    """What a round knows of its parameters.

    Attributes:
        found: the trainable ones, as the source has them.
        sizes: how many of them each group has, where groups form problems.
        kinds: dtype, device, shape and dtype of the gradient of each; None for one that is lazy.
        division: which of the different ones form one problem.
        capture: their rows.
        exchange: with the processes that have other parts of them; None: there are none.
        lazy: whether some have no shape yet, and no row.
        is_large: whether it may pay to keep task gradients as factors.
    """

    found: list[Tensor]
    sizes: Sequence[int]
    kinds: Sequence[tuple[Any, ...] | None]
    division: Division | Learning
    capture: Capture
    exchange: Exchange | None
    lazy: bool
    is_large: bool

    def memory_plan(self, tasks: int, rows: Choice, *, two_phase: bool, by_parameter: bool) -> MemoryPlan:
        """Bytes of a round, see ``GradientSurgery.memory_plan``.

        Args:
            by_parameter: whether each parameter is a problem of its own.
        """
        parameters, kept = as_rows_see(self.capture.parameters, self.capture.forms), self.capture.rows
        moved = kept if isinstance(kept, MovedGradients) else None
        problems = len(parameters if by_parameter else set(self.division.groups or [0]))
        if isinstance(kept, ShardedGradients):
            return kept.plan(tasks, parameters, problems)
        if two_phase:
            return plan_two_phase(tasks, parameters)
        if rows == "factored" and moved is None:
            return plan_factored(tasks, parameters)
        return plan_memory(
            tasks,
            parameters,
            kept.dtypes,
            moved=moved is not None,
            accumulate_dtype=None if moved is None else moved.accumulate_dtype,
            on_host=moved is not None and moved.on_host,
            problems=problems,
        )


class RowChoice(NamedTuple):
    """How a caller wants the rows, see ``GradientSurgery``; None: as the gradients come."""

    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    accumulate_dtype: torch.dtype | None = None
    by_task: bool = False
    """Whether processes share tasks out among them, and not a batch."""
    overlap: Overlap = "auto"


class Layouts:
    """The layout of the parameters that a source has at the time.

    Args:
        source: is asked for its parameter groups anew each round.
        scopes: the parameters that undergo surgery, and those that G looks at.
        granularity: which of them form one problem.
        rows: how they are kept.
    Raises:
        TypeError, ValueError: see ``GradientSurgery``.
    """

    def __init__(self, source: HasGroups, scopes: Scopes, granularity: CheckedGranularity, rows: RowChoice) -> None:
        self._source, self._scopes, self._granularity, self._rows = source, scopes, granularity, rows
        self.reach = Reach() if scopes.learn else None
        """What is known of the parameters that two tasks or more reach, where that is asked for."""
        self._group: Any = None
        self._lanes = Lanes()
        self.current = self._laid_out(self.trainable())

    @property
    def learned(self) -> tuple[Reach | None, list[Tensor]]:
        """``reach`` and all parameters that the source has, whose state is kept."""
        return self.reach, [p for group in self._source.param_groups for p in group["params"]]

    def trainable(self) -> list[Tensor]:
        """The parameters that require grad, as the source has them now."""
        return [p for group in self._source.param_groups for p in group["params"] if p.requires_grad]

    def resolve(self) -> Layout:
        """Look the trainable parameters up; lay the rows out anew where they changed.

        Raises:
            RuntimeError: they changed while rows are filled.
        """
        layout, found = self.current, self.trainable()
        filled = layout.capture.rows.tasks
        is_same = _are_same(found, layout.found) and self._sizes() == layout.sizes
        if is_same and (filled or _kinds(found) == layout.kinds):
            return layout
        if filled:
            raise RuntimeError(
                f"the trainable parameters, or their groups, changed within a round ({len(layout.found)} before, "
                f"{len(found)} now) while rows of tasks {filled} are filled: call merge() or discard() first"
            )
        self.current = self._laid_out(found)
        return self.current

    def _sizes(self) -> Sequence[int]:
        if self._granularity != "group":
            return ()
        return [sum(p.requires_grad for p in group["params"]) for group in self._source.param_groups]

    def seen(self) -> tuple[list[Tensor], list[tuple[bool, bool]]]:
        """All parameters that the source has, and of each whether it requires grad, and whether it is on a CPU.

        Where all are, as long as that is the same, and their gradients are as the rows of the layout are, so is the
        layout.
        """
        found = list(chain.from_iterable(map(_PARAMETERS, self._source.param_groups)))
        return found, list(map(_SEEN, found))

    def over(self, group: Any) -> Layout:
        """The same, but with rows that are means over a process group, of which this process has its part; None: with
        rows of its own.

        Raises:
            NotImplementedError: a choice of rows that is not covered there.
            RuntimeError: it is another group while rows are filled.
        """
        if group is not self._group:
            layout = self.current
            if filled := layout.capture.rows.tasks:
                raise RuntimeError(f"the process group changed while rows of tasks {filled} are filled: call discard()")
            before, self._group = self._group, group
            try:
                self.current = self._laid_out(layout.found, layout.capture.parameters)
            except BaseException:
                self._group = before
                raise
        return self.current

    def _laid_out(self, found: list[Tensor], parameters: Sequence[Tensor] | None = None) -> Layout:
        if parameters is None:
            parameters = list({id(p): p for p in found if not is_lazy(p)}.values())
        check_leaves(parameters)
        division = divide(parameters, self._granularity, self._source.param_groups, self._scopes, self.reach)
        lazy = any(map(is_lazy, found))
        capture, exchange = self._averaged(parameters) if self._group is not None else self._own(parameters)
        return Layout(found, self._sizes(), _kinds(found), division, capture, exchange, lazy, is_large(parameters))

    def _own(self, parameters: Sequence[Tensor]) -> tuple[Capture, Exchange | None]:
        capture = self._capture_for(parameters)
        return capture, _exchange_for(capture)

    def _averaged(self, parameters: Sequence[Tensor]) -> tuple[Capture, Exchange]:
        dtype, device, sums, by_task, overlap = self._rows
        forms = _forms_of(parameters)
        own = as_rows_see(parameters, forms)
        exchange = Exchange([Part(self._group) for _ in own], in_step=not by_task)
        rows = (ExchangedGradients if by_task else ShardedGradients)(own, dtype, exchange.link)
        if overlaps := not by_task and rows.turns > 1 and may_overlap(overlap, rows.devices):
            exchange.send_ahead(rows, self._lanes)
        if device is not None and any(host.copies_for(found, device) is not None for found in set(rows.devices)):
            raise NotImplementedError(f"rows that are {exchange} lie where the parameters do: leave row_device None")
        if sums is not None and any(gradient_dtype(p) != sums for p in own):
            raise NotImplementedError(
                f"rows that are {exchange} are summed in their gradients' dtype: leave accumulate_dtype None"
            )
        return ShardedCapture(
            parameters, rows, exchange, forms, overlaps=overlaps, of_callers_too=overlap is True
        ), exchange

    def _capture_for(self, parameters: Sequence[Tensor]) -> Capture:
        """Of rows as autograd leaves them, or of such that are converted or sent away."""
        dtype, device, sums, *_ = self._rows
        forms = _forms_of(parameters)
        own = as_rows_see(parameters, forms)
        plain = TaskGradients(own, dtype)
        dtypes = set(plain.dtypes)
        if device is not None:
            host.check_one_kind(plain.devices, dtypes)
        copies = host.copies_for(plain.devices[0] if own else torch.device("cpu"), device)
        if sums is not None:
            check_accumulate_dtype(sums, dtypes)
            if dtypes == {sums} and copies is None:  # the rows themselves will do
                sums = None
        if copies is None and sums is None and plain.dtypes == list(map(gradient_dtype, own)):
            return Capture(parameters, plain, forms)
        return MovedCapture(parameters, MovedGradients(own, dtype, sums, copies), forms)

    def snapshot(self) -> dict[str, Any]:
        """What a copy of this object needs to go on with the round, see ``restored``."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("current", "_group", "_lanes")}
        return {**state, "rows_of_round": self.current.capture.rows.snapshot()}

    @classmethod
    def restored(cls, snapshot: dict[str, Any]) -> Layouts:
        """A copy, of a copy's parameters. The layout is made anew, for its process' memory; the rows of the round go
        along."""
        rows = snapshot.pop("rows_of_round")
        layouts = cls.__new__(cls)
        layouts.__dict__.update(snapshot)
        layouts._group, layouts._lanes = None, Lanes()  # the copy's processes look for it
        layouts.current = layouts._laid_out(layouts.trainable())
        layouts.current.capture.rows.restore(rows)
        return layouts


def _are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def as_rows_see(parameters: Sequence[Tensor], forms: Mapping[int, Form]) -> Sequence[Tensor]:
    """With the shapes, strides and dtypes that their rows have."""
    if not forms:
        return parameters
    return [forms[index].like_row() if index in forms else p for index, p in enumerate(parameters)]


def _forms_of(parameters: Sequence[Tensor]) -> dict[int, Form]:
    """How rows hold the gradients of DTensors and of complex parameters, by index."""
    forms: dict[int, Form] = {}
    reducers = reducers_of(list(filter(is_dtensor, parameters)))
    for index, p in enumerate(parameters):
        if is_dtensor(p):
            forms[index] = LocalTensor(p, reducers.get(id(p)))
        elif p.is_complex():
            forms[index] = Complex(p)
    return forms


def _exchange_for(capture: Capture) -> Exchange | None:
    """With all that have parts or replicas of the parameters."""
    forms = map(capture.forms.get, range(len(capture.parameters)))
    places = [form if isinstance(form, LocalTensor) else None for form in forms]
    return Exchange(places) if any(places) else None


def _kinds(found: Sequence[Tensor]) -> Sequence[tuple[Any, ...] | None]:
    try:
        return list(map(_KIND, found))
    except RuntimeError:  # a lazy one has no shape, and one that is no leaf no grad_dtype
        return [None if is_lazy(p) else (p.dtype, p.device, p.shape, gradient_dtype(p)) for p in found]
