"""method_weights: the compiled solvers of the methods' T×T problems against those in NumPy."""

import pytest
import torch

from fastpcgrad import methods
from fastpcgrad._ops import KERNELS
from fastpcgrad.backends import cpu
from tests.methods.random_rows import error, gram, random_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")

METHODS = {
    "frank_wolfe": lambda tasks: methods.MGDA(),
    "frank_wolfe, few": lambda tasks: methods.MGDA(epsilon=1e-9, max_iters=7),
    "shortest_point": lambda tasks: methods.MGDA(solver="exact"),
    "conflict_averse": lambda tasks: methods.CAGrad(c=0.5),
    "conflict_averse, far": lambda tasks: methods.CAGrad(c=2.0),
    "fairness": lambda tasks: methods.FairGrad(alpha=1.0),
    "fairness, 0.5": lambda tasks: methods.FairGrad(alpha=0.5),
    "fairness, 3": lambda tasks: methods.FairGrad(alpha=3.0),
    "nash": lambda tasks: methods.NashMTL(),
    "project_each": lambda tasks: methods.UPGrad(),
    "project_each, exact": lambda tasks: methods.UPGrad(reg_eps=0.0),
    "project_each, preferred": lambda tasks: methods.UPGrad(pref_vector=torch.linspace(0.5, 2.0, tasks)),
    "project_one": lambda tasks: methods.DualProj(),
    "aligned": lambda tasks: methods.AlignedMTL(),
    "aligned, median": lambda tasks: methods.AlignedMTL(scale_mode="median"),
    "aligned, rmse": lambda tasks: methods.AlignedMTL(torch.linspace(0.5, 2.0, tasks), scale_mode="rmse"),
    "impartial": lambda tasks: methods.IMTLG(),
    "conflict_free": lambda tasks: methods.ConFIG(),
    "conflict_free, preferred": lambda tasks: methods.ConFIG(torch.linspace(0.5, 2.0, tasks)),
    "project_one, preferred": lambda tasks: methods.DualProj(pref_vector=torch.linspace(-1.0, 2.0, tasks)),
}
on_each_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def _needs_the_library():
    if reason := cpu.why_unavailable("cpu"):
        pytest.skip(reason)


def weights(monkeypatch, backend, name, matrix):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", backend)
    return METHODS[name](matrix.shape[-1]).weights(matrix)


def condition(name, matrix):
    """How much of an error in G the weights may have: with eigenvalues, those that count bound it."""
    if name.partition(",")[0] not in ("aligned", "impartial", "conflict_free"):
        return 1.0
    norms = matrix.diagonal().sqrt()
    unit = matrix / norms.where(norms > 0, 1.0)[:, None] / norms.where(norms > 0, 1.0)
    values = torch.linalg.eigvalsh(unit if name.startswith("conflict_free") else matrix)
    kept = values[values > values[-1] * len(values) * 2**-52]
    return float(kept[-1] / kept[0]) if len(kept) else 1.0


@on_each_method
def test_equals_numpy(monkeypatch, name):
    for seed in range(200):
        rows = random_rows(seed, max_tasks=10)
        matrix = gram(rows)
        expected = weights(monkeypatch, "eager", name, matrix)
        found = weights(monkeypatch, "cpu", name, matrix)
        assert error(found @ rows, expected @ rows, expected, rows) <= 1e-13 * condition(name, matrix), seed


@on_each_method
def test_many_tasks(monkeypatch, name):
    for tasks, seed in ((32, 1), (70, 2)):
        rows = torch.randn(tasks, 2 * tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows -= 0.9 * rows.mean(dim=0)
        expected = weights(monkeypatch, "eager", name, gram(rows))
        found = weights(monkeypatch, "cpu", name, gram(rows))
        assert error(found @ rows, expected @ rows, expected, rows) <= 1e-12 * condition(name, gram(rows)), tasks


@on_each_method
def test_the_number_of_threads_changes_no_bit(name, with_threads):
    matrices = torch.stack([gram(random_rows(seed, 12, 12)) for seed in range(40)])
    method = METHODS[name](12)
    one = with_threads(1, lambda: method.weights(matrices))
    method = METHODS[name](12)
    assert torch.equal(one, with_threads(2, lambda: method.weights(matrices)))


def test_each_solver_is_called(monkeypatch):
    """NumPy alone would pass the tests above."""
    called = []
    monkeypatch.setattr(
        cpu, "method_weights", lambda name, *rest, call=cpu.method_weights: (called.append(name), call(name, *rest))[1]
    )
    for name in METHODS:
        weights(monkeypatch, "cpu", name, torch.eye(3, dtype=torch.float64))
    assert called == [name.partition(",")[0].replace("nash", "fairness") for name in METHODS]


def test_no_library_no_answers(monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "eager")
    assert KERNELS["method_weights"]("frank_wolfe", torch.eye(2).double(), (0.1, 1.0), None) is None


def test_an_unknown_solver_is_refused(monkeypatch):
    monkeypatch.setitem(cpu.abi.SOLVERS, "nothing", 99)
    with pytest.raises(ValueError, match="fpg_cpu_method_weights"):
        cpu.method_weights("nothing", torch.eye(2).double(), (0.1, 1.0), None)
