"""Stays inside tasks, in which ``.grad`` belongs to the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

from torch import Tensor

from .._graph import check_kept, explain
from .._modes import not_compiled
from ..distributed.exchange import OutOfStep
from ..distributed.groups import NOBODY, Processes
from ..methods import Method
from .capture import Capture, MovedCapture
from .layout import Layout, Layouts
from .task_gradients import TaskGradients

_NOBODY_WAITS = nullcontext()


class Stays:
    """The stays of one surgery, of which one at most is open.

    From its first change on the open one is known here, so that whatever an exception cuts off can be put right.
    """

    def __init__(self, layouts: Layouts, processes: Processes) -> None:
        self.layouts, self.processes = layouts, processes
        self.open: Stay | None = None
        self.is_clear = not layouts.current.capture.rows.tasks
        """Whether no stay has begun since the last round ended."""

    def resolve(self) -> Layout:
        """The layout of a round that begins now.

        Raises:
            NotImplementedError, RuntimeError: see ``Processes.check`` and ``Layouts``.
        """
        capture = self.layouts.resolve().capture
        self.processes.check(capture.parameters, moved=isinstance(capture, MovedCapture))
        return self.layouts.over(self.processes.group)

    def look(self, losses: Mapping[int, Tensor], *, are_kept: bool = False, tasks: int = 0) -> None:
        """At losses whose backward passes are about to be run.

        Args:
            are_kept: whether graphs are kept for further passes.
            tasks: T, where all must have been there by now.
        Raises:
            RuntimeError: see ``check_kept``, and ``Reach.check_known``.
        """
        if are_kept:
            check_kept(list(losses.values()))
        if self.layouts.reach is not None:
            self.layouts.reach.check_known(tasks, losses)

    def check_outside(self, what: str) -> None:
        """RuntimeError inside a task."""
        if self.open is not None:
            raise RuntimeError(
                f"{what} inside task({self.layouts.current.capture.task}): leave the task first; where an interrupt "
                "has cut it off, call discard()"
            )

    def telling(self) -> AbstractContextManager[None]:
        """Within, an error of a process that has tasks of its own ends the round of all, which wait at the merge."""
        return self._telling() if self.processes.by_task else _NOBODY_WAITS

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            exchange = self.resolve().exchange
            if exchange is not None:
                exchange.rounds.fail()
                self.discard()
            raise

    def meet(self, point: str, *details: object) -> None:
        """Wait for those who have other parts of the parameters and enter the same tasks, if any. Where they are
        elsewhere, the round ends."""
        exchange = self.layouts.current.exchange
        if exchange is not None and exchange.in_step:
            self._arrive(point, *details)

    def collect(self, method: Method, tasks: int, mean: bool) -> TaskGradients:
        """The rows of a round, which all processes merge now.

        Args:
            method: that is going to.
            tasks, mean: see ``TaskGradients.collect``.
        Raises:
            RuntimeError: there are none; see ``GradientSurgery.merge``.
        """
        if self.processes.by_task and not self.layouts.current.capture.rows.tasks:
            self.resolve()  # a process that has no task in this round has not looked yet who the others are
        layout = self.layouts.current
        rows, reach = layout.capture.rows, self.layouts.reach
        if layout.exchange is not None:
            state = {key: list(value.shape) for key, value in method.state_dict().items() if isinstance(value, Tensor)}
            learned = None if reach is None else reach.digest(layout.capture.parameters)
            self._arrive("merge() of tasks", *rows.summary(tasks, mean), type(method).__name__, state, learned)
        rows.collect(tasks, mean)
        if not rows.tasks:
            raise RuntimeError("merge() with no task: fill rows inside 'with surgery.task(t)' first")
        if reach is not None:
            reach.check_known(tasks, rows.tasks)
        return rows

    def _arrive(self, point: str, *details: object) -> None:
        exchange = self.layouts.current.exchange
        if exchange is not None:
            try:
                exchange.rounds.arrive(point, *details)
            except BaseException:
                self.discard()
                raise

    def discard(self) -> None:
        """End the open one, if there is any, and the round."""
        if self.open is not None:
            self.open.leave()
        self.end_round()

    def end_round(self) -> None:
        """Forget the rows."""
        layout, self.is_clear = self.layouts.current, True
        layout.capture.rows.clear()
        if layout.exchange is not None:
            layout.exchange.rounds.restart()


class Stay:
    """A stay inside tasks, one after the other. Gradients that were there before come back at the end.

    Args:
        stays: of the surgery.
        forward: whether forward passes run inside.
        losses: of how many losses backward passes are run here, of one forward maybe; None: the caller runs them.
    """

    def __init__(self, stays: Stays, *, forward: bool = False, losses: int | None = None) -> None:
        self._stays, self._forward, self._losses = stays, forward, losses

    def __enter__(self) -> Capture:
        layout = self._stays.resolve()
        if layout.lazy and self._forward:
            raise RuntimeError(
                "a forward pass inside a task would give lazy parameters a shape, which then are in no row: run one "
                "before the first task"
            )
        capture = layout.capture
        if self._losses is not None:
            self._stays.processes.check_passes(1 if self._forward else self._losses)
        self.begin(capture)
        return capture

    def begin(self, capture: Capture) -> None:
        """What is there comes aside. Without a look at whether the round may begin."""
        self.prepare(capture)
        self._aside = capture.aside()
        self._silence = self._stays.processes.silence()
        self._stays.open, self._stays.is_clear = self, False
        self._silence.begin()
        capture.enter()

    def prepare(self, capture: Capture) -> None:
        """For stays that begin when ``Stays.open`` says so: nothing need come aside, and nobody be silent."""
        self._capture, self._aside, self._silence = capture, [], NOBODY

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.check_open()
        if self._stays.open is self:
            self.leave()
        exchange = self._stays.layouts.current.exchange
        if exchange is not None and isinstance(error, Exception):
            if not isinstance(error, OutOfStep):
                exchange.rounds.fail()
            self._stays.discard()
        if error is not None:
            explain(error)

    def check_open(self) -> None:
        """RuntimeError where something that ran inside has ended it."""
        if self._stays.open is not self:
            raise RuntimeError(
                "another round began, or discard() was called, while losses were run backward, as in a hook: what came "
                "later is in no row"
            )

    def leave(self) -> None:
        """End it. A task that is open is absent unless it is opened again: what there is is no whole gradient."""
        self._capture.leave(self._aside)
        self._silence.end()
        self._stays.open, self._aside = None, []


class Task(Stay):
    """A stay inside one task."""

    def __init__(self, stays: Stays, index: int) -> None:
        super().__init__(stays, forward=True)
        self._index = index

    @not_compiled
    def __enter__(self) -> Capture:
        self._stays.check_outside(f"task({self._index})")
        capture = super().__enter__()
        try:
            self._stays.meet("task", self._index)
            capture.open(self._index)
            capture.watch(self._stays.processes.is_averaging)
        except BaseException as error:
            super().__exit__(type(error), error, error.__traceback__)
            raise
        return capture

    @not_compiled
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._stays.open is not self:
            raise RuntimeError(f"discard() inside task({self._index}) has ended it: what came later is in no row")
        try:
            if kind is None:
                self._silence.check()
                self._capture.close()
        except BaseException as raised:
            error = raised
            raise
        finally:
            super().__exit__(kind, error, trace)
