"""``pytest benchmarks --benchmark-only [--quick] [--threads 2] [--minutes M]``: calls, by pytest-benchmark.

The plugin has the statistics, the groups, the machine's description and the storage (``--benchmark-json``,
``--benchmark-autosave``, ``--benchmark-compare``, ``--benchmark-histogram``). Added here: who is compared with the
library takes turns with it, who is wrong gets no numbers, and who is left out says why in the report.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import bandwidth, rows, saved
from benchmarks.rows import SKIPPED_BUDGET, SKIPPED_LATE, Row, failed
from benchmarks.session import Run
from benchmarks.timing import Call, Plan, Samples, milliseconds, paired_ratio, warm_up

UNMEASURED = pytest.StashKey[list[dict[str, Any]]]()
ONE_CALL = 60.0
"""Seconds of a call of which more are not waited for."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastpcgrad")
    group.addoption("--quick", action="store_true", help="fewer and smaller cases")
    group.addoption("--threads", type=int, default=2, help="of torch")
    group.addoption("--minutes", type=float, default=float("inf"), help="what has not begun by then is skipped")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[UNMEASURED] = []
    # Where the time is up before anything began there is nothing to save, and no harm done.
    config.addinivalue_line("filterwarnings", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    here = rows.environment(config.getoption("threads"))
    machine_info |= {"threads": here.threads, "torch": here.torch, "numpy": here.numpy}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json[saved.UNMEASURED] = config.stash[UNMEASURED]


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    threads, before = request.config.getoption("threads"), torch.get_num_threads()
    torch.set_num_threads(threads)
    started = Run(rows.environment(threads), quick=request.config.getoption("quick"))
    started.allow(request.config.getoption("minutes"))
    yield started
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def probe(run: Run) -> bandwidth.Probe:
    return bandwidth.Probe(run.environment.threads)


@pytest.fixture(scope="session")
def rates() -> dict[str, float]:
    """Seconds that slow subjects took for a unit of work."""
    return {}


@dataclass
class Timed:
    """Times a call by the plugin, and records the row that it belongs to."""

    _benchmark: BenchmarkFixture
    _run: Run
    _rates: dict[str, float]
    _unmeasured: list[dict[str, Any]]

    def refuse(self, row: Row, status: str) -> NoReturn:
        """No numbers; it is an error where the subject should have had some."""
        self._unmeasured.append(rows.fields_of(row) | {"status": status})
        if status.startswith(("wrong", "failed")):
            pytest.fail(status)
        pytest.skip(status)

    def one_of_several_ways(self, row: Row, call: Call, moved: int = 0) -> None:
        """In calibrated rounds, of which the plugin says how many there are."""
        self._describe(row, moved, ways=True)
        if self._run.late:
            self.refuse(row, SKIPPED_LATE)
        self._benchmark(call)

    def in_turn(
        self, row: Row, make: Callable[[], Call], plan: Plan, against: Call | None, moved: int = 0, work: int = 0
    ) -> None:
        """``against``: the library's call, made and timed before each round; None: it is the library itself.

        ``work``: what the subject's time grows with where it is slow. By its rate a call is skipped that would take
        too long, and one that is not affordable twice has no warm-up.
        """
        self._describe(row, moved)
        expected = self._rates.get(row.subject, 0.0) * work
        if self._run.late:
            self.refuse(row, SKIPPED_LATE)
        if expected > ONE_CALL:
            self.refuse(row, f"{SKIPPED_BUDGET} (one call: {expected:.0f} s predicted, {ONE_CALL:.0f} s allowed)")
        cold = expected > plan.cold
        try:
            call = make()
            rounds = 1 if cold else max(1, plan.rounds(warm_up({"call": call}, plan)[1]))
            theirs = self._rounds(call, rounds, against)
        except Exception as error:
            self.refuse(row, failed(error))
        if self._benchmark.enabled:
            own = Samples.of((1e3 * s for s in self._benchmark.stats.stats.data), cold)
            ratio = paired_ratio(Samples.of(theirs), own) if theirs else 0.0
            self._benchmark.extra_info |= {saved.COLD: cold, saved.RATIO: ratio}
            if work:
                self._rates[row.subject] = own.median / 1e3 / work

    def _rounds(self, call: Call, rounds: int, against: Call | None) -> list[float]:
        """The plugin's rounds of a call; gives the milliseconds of the other, each before the round of the same number.

        Where there are too few rounds for ratios by round, each is the median of several calls.
        """
        theirs: list[float] = []
        if against is None:
            self._benchmark.pedantic(call, rounds=rounds)
            return theirs
        against()
        calls = 1 if rounds >= 3 else 5

        def turn() -> None:
            theirs.append(statistics.median(milliseconds({"call": against})["call"] for _ in range(calls)))

        self._benchmark.pedantic(call, setup=turn, rounds=rounds)
        return theirs

    def _describe(self, row: Row, moved: int, ways: bool = False) -> None:
        self._benchmark.group = row.case
        self._benchmark.extra_info = {
            saved.ROW: rows.fields_of(row), saved.BYTES: moved, saved.RATIO: 0.0, saved.COLD: False, saved.FASTEST: ways
        }  # fmt: skip


@pytest.fixture
def timed(benchmark: BenchmarkFixture, run: Run, rates: dict[str, float], request: pytest.FixtureRequest) -> Timed:
    return Timed(benchmark, run, rates, request.config.stash[UNMEASURED])
