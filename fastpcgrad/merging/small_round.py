"""A whole round of a small model in one function.

Right after a backward pass Python finds the caches cold, so that with few elements the way through the rooms takes
longer than what is done there. This is that way for what is plain and most common: a model on the CPU whose gradients
stay where autograd left them, losses that are there, PCGrad as one problem. Nothing is decided here that is not decided
there, and what turns out to be less plain is left to them in the middle of the round.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import _modes
from .._blocks import Blocks, addresses
from .._graph import explain
from ..backends import cpu, select
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


class SmallRound:
    """Rounds of one layout.

    Args:
        layout: one that is served.
        stays: of the surgery.
    """

    def __init__(self, layout: Layout, stays: Stays) -> None:
        self._capture, self._stays = layout.capture, stays
        rows = layout.capture.rows
        self._kind = rows.widths, rows.dtypes[0], rows.devices[0]

    @staticmethod
    def serves(layout: Layout) -> bool:
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
        )

    def takes(self, losses: Mapping[int, Tensor], method: Method, rows: Choice) -> bool:
        """Whether the round to come is of this kind."""
        return (
            type(method) is PCGrad
            and rows != "factored"
            and self._stays.layouts.is_current()
            and method.scope != "parameter"
            and not method.variant.norm_eps
            and not is_initialized()
            and "torch._inductor.compile_fx" not in sys.modules
            and not _modes.is_on()
            and all(type(loss) is Tensor for loss in losses.values())
            and select("cpu") is cpu
        )

    def run(self, losses: Mapping[int, Tensor], retain_graph: bool, method: Method) -> ConflictReport | None:
        """Each loss backward, and the merge; None where that is still to be done, with the rows that are kept.

        Raises:
            Whatever a backward pass or the method raises; the stay has ended by then.
        """
        capture = self._capture
        rows: list[Any] = []
        left, plain = len(losses), True
        stay = Stay(self._stays)
        stay.begin(capture)
        try:
            for index, loss in losses.items():
                left -= 1
                if plain:
                    capture.task = index
                else:
                    capture.open(index)
                capture.run(loss, retain_graph or left > 0)
                if not plain:
                    capture.close()
                    continue
                row = capture.taken()
                if capture.rows.may_keep(row):
                    rows.append(row)
                    continue
                plain = False
                rows.append(row)
                for task in list(losses)[: len(rows)]:
                    capture.rows.take(task)
                    capture.rows.keep(task, rows.pop(0))
                capture.task = -1
            capture.task = -1
        except BaseException as error:
            explain(error)
            raise
        finally:
            if self._stays.open is stay:
                stay.leave()
        return self._merged(tuple(losses), rows, method) if plain else None

    def _merged(self, tasks: tuple[int, ...], rows: list[Row], method: Method) -> ConflictReport:
        projections = method.projections(len(rows), self._kind[-1])
        assert projections is not None
        order, guards, scale = projections
        pointers = list(map(addresses, rows))
        figures = cpu.pcgrad_blocks(Blocks(rows, pointers, *self._kind), order, guards, scale, rows[0])
        self._capture.give(rows[0])
        report = ConflictReport(tasks, figures)
        report.rows = SMALL
        return report


class SmallRounds:
    """Those of one surgery. Whether a layout is served is looked up after its first round, which is one of the others.

    Args:
        stays: of the surgery.
    """

    def __init__(self, stays: Stays) -> None:
        self._stays = stays
        self._known: tuple[Layout | None, SmallRound | None] = None, None

    def taking(self, losses: Mapping[int, Tensor], method: Method, rows: Choice) -> SmallRound | None:
        """The round to come, if it is of this kind."""
        layout, small = self._known
        is_taken = small is not None and layout is self._stays.layouts.current and small.takes(losses, method, rows)
        return small if is_taken else None

    def look(self) -> None:
        """After a round of the others."""
        layout = self._stays.layouts.current
        if layout is not self._known[0]:
            self._known = layout, SmallRound(layout, self._stays) if SmallRound.serves(layout) else None
