"""One call of an op on a packed J that exists already, by the library, torch and the peers.

Competitors that need another form of J (a list of rows, a mask) get it before the clock starts; a preallocated result
where the op takes one. Each is compared with the float64 oracle first.
"""

from __future__ import annotations

import pytest

from benchmarks import cases, check, kernels
from benchmarks.bandwidth import Probe
from benchmarks.cases import KernelCase
from benchmarks.conftest import Timed
from benchmarks.kernels import Contender, Pool
from benchmarks.memory import available_bytes
from benchmarks.rows import LIBRARY, MACHINE, Row
from benchmarks.session import Run
from benchmarks.timing import Plan

pytestmark = [
    pytest.mark.benchmark(disable_gc=True),
    pytest.mark.filterwarnings("ignore"),  # a peer's; they change no number
]

STREAMING = 256 << 20
"""Ops that move fewer bytes a call may find their data in a cache: no fraction of bandwidth for them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    if "way" in metafunc.fixturenames:
        probe = Probe(config.getoption("threads"), elements=8)
        metafunc.parametrize(("op", "way"), [(op, way) for op, ways in probe.ways.items() for way in ways])
    if "subject" in metafunc.fixturenames:
        found = cases.kernel_cases(config.getoption("quick"))
        metafunc.parametrize(("case", "subject"), [(case.label, name) for case in found for name in _subjects(case)])


def _subjects(case: KernelCase) -> list[str]:
    machine = [MACHINE] if case.bytes_moved >= STREAMING and case.op != "pcgrad" else []
    return [*(contender.name for contender in kernels.contenders(case)), *machine]


@pytest.fixture(scope="module")
def grid(run: Run) -> dict[str, KernelCase]:
    return {case.label: case for case in cases.kernel_cases(run.quick)}


@pytest.fixture(scope="module")
def pool(grid: dict[str, KernelCase]) -> Pool:
    return Pool(max(case.tasks * case.row_stride for case in grid.values()))


@pytest.fixture(scope="module")
def checked() -> dict[object, str]:
    return {}


def test_bandwidth(op: str, way: str, timed: Timed, run: Run, probe: Probe) -> None:
    moved = "read" if op == "read" else "read and written"
    note = f"{probe.size}; bytes {moved} per second; the fastest of several ways, by its median"
    row = run.row("bandwidth", f"{op} bandwidth", op, MACHINE, backend=way, dtype=None, note=note)
    timed.one_of_several_ways(row, probe.ways[op][way], probe.bytes[op])


def test_kernel(
    case: str, subject: str, timed: Timed, run: Run, grid: dict[str, KernelCase], pool: Pool, probe: Probe,
    checked: dict[object, str],
) -> None:  # fmt: skip
    chosen = grid[case]
    contenders = {contender.name: contender for contender in kernels.contenders(chosen)}
    plan = Plan(0.15, least=5, most=20) if run.quick else Plan(0.35, least=5, most=40, slow=1.0)
    inputs, library = pool.inputs(chosen), contenders[LIBRARY].build
    assert not isinstance(library, str)
    against = None if subject == LIBRARY else library(inputs)
    if subject == MACHINE:
        op = "read" if chosen.op == "gram" else "copy"
        machine = Contender(MACHINE, "", "", lambda _: probe.fastest(op))
        timed.in_turn(_row(run, chosen, machine), lambda: probe.fastest(op), plan, against, probe.bytes[op])
        return
    contender = contenders[subject]
    row, build = _row(run, chosen, contender), contender.build
    if isinstance(build, str):
        timed.refuse(row, build)
    if why := _objection(contender, chosen, checked):
        timed.refuse(row, why)
    moved = chosen.bytes_moved if chosen.bytes_moved >= STREAMING else 0
    timed.in_turn(row, lambda: build(inputs), plan, against, moved, chosen.work if contender.slow else 0)


def _objection(contender: Contender, case: KernelCase, checked: dict[object, str]) -> str:
    """Why there will be no numbers; empty where there will be. Who was checked in another shape is not again."""
    key = (contender.name, case.op, case.dtype, case.layout)
    if key not in checked:
        checked[key] = check.objection(lambda: check.kernel_error(contender, case))
    needed = contender.copies * case.tasks * case.width * case.itemsize
    if not checked[key] and needed > 0.7 * available_bytes():
        return f"skipped: memory ({needed / 2**30:.1f} GiB needed)"
    return checked[key]


def _row(run: Run, case: KernelCase, who: Contender) -> Row:
    return run.row(
        "kernel", case.label, case.op, who.name, subject_version=who.version, backend=who.backend,
        T=case.tasks, N=case.width, dtype=case.dtype, layout=case.layout,
    )  # fmt: skip
