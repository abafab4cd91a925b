"""Pages that hold tables between two markers, from rows alone: of the latest run of each file, unless said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import many_tasks, quality_tables, rows, tables
from benchmarks.rows import ROOT, Row


@dataclass(frozen=True)
class Page:
    """A page of which a part is written from the rows of files of results, by name."""

    path: Path
    results: tuple[str, ...]
    marker: str
    table: Callable[[Sequence[Row]], str]
    chosen: Callable[..., list[Row]] = rows.latest_of

    def written(self) -> str:
        """The page as it must be; ValueError unless it has each of the two markers once, in this order."""
        page = self.path.read_text(encoding="utf-8")
        start, end = f"<!-- {self.marker}:start -->", f"<!-- {self.marker}:end -->"
        if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
            raise ValueError(f"{self.path} must hold {start} and {end} once each, in this order")
        content = self.table(self.chosen(*self.results))
        return f"{page.split(start)[0]}{start}\n{content}\n{end}{page.split(end)[1]}"

    def is_stale(self) -> bool:
        return self.path.read_text(encoding="utf-8") != self.written()


PAGES = (
    Page(ROOT / "README.md", ("steps", "memory"), "summary-table", tables.summary),
    Page(ROOT / "docs" / "benchmarks.md", ("cpu", "steps", "memory"), "benchmark-table", tables.cpu),
    Page(ROOT / "docs" / "benchmarks.md", ("factored",), "factored-table", tables.factored),
    Page(ROOT / "docs" / "below_the_floor.md", ("floor",), "floor-table", tables.floor),
    Page(ROOT / "docs" / "kernels.md", ("gpu",), "gpu-table", tables.gpu),
    Page(ROOT / "docs" / "methods.md", ("methods",), "methods-table", tables.methods),
    Page(ROOT / "docs" / "methods.md", ("many",), "many-table", many_tasks.table),
    Page(ROOT / "docs" / "quality.md", ("quality",), "quality-table", quality_tables.page, rows.every_of),
)
