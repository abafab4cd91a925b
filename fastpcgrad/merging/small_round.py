"""A whole round of a small model in one function.

Right after a backward pass Python finds the caches cold, so that with few elements the way through the rooms takes
longer than what is done there: what counts is how many functions there are on the way. This is that way for what is
plain and most common: a model on the CPU whose gradients stay where autograd left them, losses that look like those of
a round before, PCGrad as one problem. Nothing is decided here that is not decided there, and what turns out to be less
plain is left to them in the middle of the round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter, is_
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .. import _modes
from .._graph import explain, run_backward
from .._tasks import TaskNames
from ..backends import cpu, kernels, select
from ..distributed.processes import is_initialized
from ..methods import Method, PCGrad
from ..rows.capture import Capture
from ..rows.choice import SMALL, Choice
from ..rows.layout import Layout
from ..rows.parameters import UNDIVIDED
from ..rows.stays import Stay, Stays
from ..rows.task_gradients import Row
from .report import ConflictReport

LARGEST = 1 << 17
"""Elements of a row; above, a round takes as long one way or the other."""
_LOOKS = attrgetter("__class__", "dtype", "shape", "device", "requires_grad")
"""All that ``check_loss`` looks at."""
_GRAD = attrgetter("grad")
_NOTHING = {NoneType}


class SmallRound:
    """The rounds of one surgery that are of this kind.

    Args:
        stays: of the surgery.
    """

    def __init__(self, stays: Stays) -> None:
        self._stays, self._stay = stays, Stay(stays)
        self._layout: Layout | None = None
        self._looks: frozenset[tuple[Any, ...]] = frozenset()
        self._by_tasks: dict[int, cpu.SmallPCGrad] = {}

    def note(self, losses: Mapping[int, Tensor], method: Method) -> None:
        """After a round of the others, whose losses were checked: those to come may be of this kind if theirs look the
        same."""
        if type(method) is not PCGrad:
            return
        layouts = self._stays.layouts
        if layouts.current is not self._layout:
            self._layout, self._is_served = layouts.current, _serves(layouts.current)
            self._stay.prepare(self._layout.capture)
            self._by_tasks = {}
        self._looks = frozenset()
        if self._is_served and all(type(loss) is Tensor for loss in losses.values()):
            self._looks = frozenset(map(_LOOKS, losses.values()))
            self._one = _kept_one(losses.values())
            self._parameters, self._seen = layouts.seen()
            self._merging(len(losses))

    def takes(self, losses: Iterable[Any], method: Method, rows: Choice) -> bool:
        """Whether the round to come is of this kind, which no loss prevents that is to be refused."""
        if type(method) is not PCGrad:
            return False
        try:
            look_alike = self._looks.issuperset(map(_LOOKS, losses))
        except AttributeError:  # what is no tensor
            return False
        if not (
            look_alike
            and self._stays.is_clear
            and self._stays.layouts.current is self._layout
            and rows != "factored"
            and method.scope != "parameter"
            and not method.variant.norm_eps
            and not is_initialized()
            and "torch._inductor.compile_fx" not in sys.modules
            and not _modes.is_on()
            and select("cpu") is cpu
        ):
            return False
        found, seen = self._stays.layouts.seen()
        return len(found) == len(self._parameters) and all(map(is_, found, self._parameters)) and seen == self._seen

    def run(
        self, losses: Mapping[int, Tensor], retain_graph: bool, method: Method, names: TaskNames
    ) -> ConflictReport | None:
        """Each loss backward, and the merge; None where that is still to be done, with the rows that are kept.

        Raises:
            Whatever a backward pass or the method raises; the stay has ended by then.
        """
        assert self._layout is not None and isinstance(method, PCGrad)
        stays, capture, left = self._stays, self._layout.capture, len(losses)
        rows: list[list[Any]] = []
        parameters, may_stay, one = capture.parameters, capture.rows.may_keep, self._one
        stay, is_bare = self._stay, set(map(type, map(_GRAD, parameters))) == _NOTHING
        if is_bare:
            stays.open = stay
        else:
            stay.begin(capture)
        try:
            for capture.task, loss in losses.items():
                left -= 1
                run_backward(loss, retain_graph or left > 0, (), one())
                if stays.open is not stay:
                    stay.check_open()
                rows.append(list(map(_GRAD, parameters)))
                for p in parameters:
                    p.grad = None
                if not left:
                    may_stay = capture.rows.may_read
                if not may_stay(rows[-1]):
                    stay.leave()
                    self._leave_to_the_others(losses, rows, retain_graph)
                    return None
            capture.task = -1
            if is_bare:
                stays.open = None
        except BaseException as error:
            explain(error)
            raise
        finally:
            if stays.open is stay:
                stay.leave()
        stays.is_clear = True
        variant, tasks = method.variant, len(rows)
        merge = self._by_tasks.get(tasks) or self._merging(tasks)
        order = variant.draw(tasks, method.generator, kernels.permutations)
        figures = merge(rows, order, variant.guards, method.scale(tasks))
        capture.give(rows[0])
        report = ConflictReport(tuple(losses), figures)
        report.rows, report.names = SMALL, names
        return report

    def _leave_to_the_others(self, losses: Mapping[int, Tensor], rows: list[Row], retain_graph: bool) -> None:
        """Keep the rows that are there as if they had just been made, and make those that are to come.

        Args:
            rows: used up: nobody but ``.grad`` is to hold what is in them.
        """
        assert self._layout is not None
        parameters, left = self._layout.capture.parameters, len(losses)
        with Stay(self._stays, losses=left) as capture:
            for task, loss in losses.items():
                left -= 1
                capture.open(task)
                if rows:
                    row = rows.pop(0)
                    for p in reversed(parameters):
                        p.grad = row.pop()
                else:
                    capture.run(loss, retain_graph or left > 0)
                capture.close()

    def _merging(self, tasks: int) -> cpu.SmallPCGrad:
        """Of so many rows."""
        assert self._layout is not None
        rows = self._layout.capture.rows
        made = self._by_tasks[tasks] = cpu.SmallPCGrad(tasks, rows.widths, rows.dtypes[0])
        return made


def _kept_one(losses: Iterable[Tensor]) -> Callable[[], Tensor | None]:
    """Gives the gradient of each of these losses, one tensor for all passes as long as nobody writes to it; None where
    there is none for all."""
    (dtype, shape, device), *others = {(loss.dtype, loss.shape, loss.device.type) for loss in losses}
    if others or dtype == torch.bfloat16 or device != "cpu":
        return lambda: None
    with torch.inference_mode(False):
        one = torch.ones(shape, dtype=dtype, device="cpu")
    number = one.numpy()  # where looking is cheap
    return lambda: one if number.item() == 1 else None


def _serves(layout: Layout) -> bool:
    """Whether rounds of a layout are of this kind, as far as that does not change from one to the next."""
    capture = layout.capture
    rows = capture.rows
    return (
        type(capture) is Capture
        and not (capture.forms or layout.lazy or layout.is_large or layout.exchange)
        and layout.division == UNDIVIDED
        and 0 < sum(rows.widths) <= LARGEST
        and len(set(rows.dtypes)) == 1
        and all(device.type == "cpu" for device in rows.devices)
        and cpu.why_unavailable("cpu") is None
    )
