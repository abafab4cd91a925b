"""A run of a benchmark from the command line: its options, its console, its time, its rows."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks import rows
from benchmarks.rows import Environment, Row


def command(module: str, summary: str, quick: str, results: Path) -> argparse.ArgumentParser:
    """Options of ``python -m benchmarks.<module>``; ``quick`` says what ``--quick`` leaves."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=summary)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--append", action="store_true", help="append the rows to the results file")
    parser.add_argument("--results", type=Path, default=results, help="where --append writes")
    return parser


@dataclasses.dataclass
class Session:
    """What every part of a run needs."""

    environment: Environment
    quick: bool
    console: Console
    _deadline: float = float("inf")

    @classmethod
    def begin(cls, options: argparse.Namespace, columns: int) -> Session:
        """With the threads asked for; ``columns``: of the console where it is no terminal."""
        torch.set_num_threads(options.threads)
        console = Console()
        if not console.is_terminal:
            console = Console(width=columns)
        session = cls(rows.environment(options.threads), options.quick, console)
        console.print(session.environment)
        return session

    def keep(self, measured: Sequence[Row], options: argparse.Namespace) -> None:
        """Append the rows where ``--append`` asks for it."""
        if options.append:
            rows.append(measured, options.results)
            self.console.print(f"{len(measured)} rows appended to {options.results}")

    def allow(self, minutes: float) -> None:
        """From now on: a busy machine must not turn a run into an afternoon."""
        self._deadline = time.monotonic() + 60 * minutes

    @property
    def late(self) -> bool:
        return time.monotonic() > self._deadline

    @property
    def threads(self) -> int:
        return self.environment.threads

    @contextlib.contextmanager
    def progress(self, title: str, steps: int) -> Iterator[Callable[[str], None]]:
        """Yields a function that names what starts now."""
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[title]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=steps, title=title)
            started = False

            def starts(what: str) -> None:
                nonlocal started
                progress.update(task, advance=1 if started else 0, description=what)
                started = True

            yield starts
