"""One run of a benchmark: where it takes place, how long it may last, and its rows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.rows import Environment, Kind, Row


@dataclasses.dataclass
class Run:
    """What everything that measures is given.

    Attributes:
        device: of the tensors, ``cpu`` or ``cuda``.
        quick: fewer and smaller cases.
        results: the file that rows are appended to, as soon as they are there; nowhere if None.
    """

    environment: Environment
    device: str = "cpu"
    quick: bool = False
    results: Path | None = None
    rows: list[Row] = dataclasses.field(default_factory=list)
    _deadline: float = float("inf")

    def row(self, kind: Kind, case: str, op: str, subject: str, **fields: Any) -> Row:
        """Without numbers yet, or with a ``status`` that says why there are none."""
        return Row(kind, case, op, subject, self.environment, **{"dtype": "float32"} | fields)

    def add(self, found: Iterable[Row]) -> list[Row]:
        """Keeps rows at once: a run that is cut off has measured what it has measured."""
        new = list(found)
        self.rows += new
        if self.results is not None:
            rows.append(new, self.results)
        return new

    def allow(self, minutes: float) -> None:
        """From now on: a busy machine must not turn a run into an afternoon."""
        self._deadline = time.monotonic() + 60 * minutes

    @property
    def late(self) -> bool:
        return time.monotonic() > self._deadline

    def starts(self, what: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {what}", flush=True)

    def show_failures(self) -> None:
        for row in self.rows:
            if not row.ok:
                print(f"{row.kind} {row.case} {row.subject} {row.backend}: {row.status}")
