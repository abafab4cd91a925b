"""Every method of ``fastpcgrad.methods`` against TorchJD's, at T = 2, 8 and 32.

- *weights*: G to weights, on a Gram matrix that exists: float64 for the library, for TorchJD its own of the same J.
  Methods that are no function of G have no such row.
- *aggregation*: the merged gradient of a packed fp32 J [T, N]: Gram matrix, weights and combination. What it takes to
  read J twice says how far it can go for a method that looks at G.

The task gradients conflict pairwise. The note says how far apart the two results are on a small float64 J.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks import bandwidth, kernels, method_cases
from benchmarks.conftest import Timed
from benchmarks.method_cases import FLOOR, PEER, task_gradients
from benchmarks.rows import LIBRARY, MACHINE, missing, version_of
from benchmarks.session import Run
from benchmarks.timing import Plan
from fastpcgrad import methods
from fastpcgrad.methods.elementwise import Elementwise

pytestmark = [
    pytest.mark.benchmark(disable_gc=True),
    pytest.mark.filterwarnings("ignore"),  # a peer's; they change no number
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        ways = bandwidth.reads(torch.zeros(1))
        metafunc.parametrize(("tasks", "way"), [(tasks, way) for tasks in method_cases.TASKS for way in ways])
    if "subject" in metafunc.fixturenames:
        named = [(tasks, name) for tasks in method_cases.TASKS for name in method_cases.names(tasks)]
        found = [(*case, op, who) for case in named for op in _ops(case[1]) for who in (LIBRARY, PEER)]
        metafunc.parametrize(("tasks", "method", "op", "subject"), found)


def _ops(name: str) -> tuple[str, ...]:
    return ("aggregation",) if issubclass(getattr(methods, name), Elementwise) else ("aggregation", "weights")


apart = functools.cache(method_cases.apart)


@functools.lru_cache(1)
def _grads(tasks: int, quick: bool) -> Tensor:
    return task_gradients(tasks, 1 << 18 if quick else 1 << 22)


def test_reading_twice(tasks: int, way: str, timed: Timed, run: Run) -> None:
    """Less no method can that looks at G."""
    grads = _grads(tasks, run.quick)
    read, width = bandwidth.reads(grads.view(-1))[way], grads.shape[1]
    row = run.row("method", f"{FLOOR} T={tasks} N={width}", FLOOR, MACHINE, T=tasks, N=width, note=f"2 x {way}")
    timed.one_of_several_ways(row, lambda: (read(), read()))


def test_method(tasks: int, method: str, op: str, subject: str, timed: Timed, run: Run) -> None:
    grads = _grads(tasks, run.quick)
    plan = Plan(0.1, least=5, most=50) if run.quick else Plan(0.5, least=7, most=500)
    note, status, width = "", "ok", grads.shape[1]
    try:
        note = f"{apart(method, tasks):.1e} apart"
        theirs = method_cases.peer_call(method, op, grads)
    except (ImportError, AttributeError) as error:
        status = missing(error)
    row = run.row(
        "method", f"{method} {op} T={tasks} N={width}", f"{method}.{op}", subject, T=tasks, N=width,
        layout="contiguous", note=note, subject_version=version_of(subject),
        backend=kernels.library_backend() if subject == LIBRARY else "",
    )  # fmt: skip
    own = method_cases.library_call(method, op, grads)
    if subject == LIBRARY:
        timed.in_turn(row, lambda: own, plan, None)
    elif status != "ok":
        timed.refuse(row, status)
    else:
        timed.in_turn(row, lambda: theirs, plan, own)
