"""method_weights: what the compiled solvers have in common; tests/methods compares each with its oracle."""

import pytest
import torch

from fastpcgrad import methods
from fastpcgrad.backends import cpu, kernels
from tests.methods.random_rows import gram, random_rows

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


@on_each_method
def test_the_number_of_threads_changes_no_bit(name, with_threads):
    matrices = torch.stack([gram(random_rows(seed, 12, 12)) for seed in range(40)])
    method = METHODS[name](12)
    one = with_threads(1, lambda: method.weights(matrices))
    method = METHODS[name](12)
    assert torch.equal(one, with_threads(2, lambda: method.weights(matrices)))


def test_each_solver_is_called(monkeypatch):
    """NumPy alone would pass the tests of the methods."""
    called = []
    monkeypatch.setattr(
        cpu, "method_weights", lambda name, *rest, call=cpu.method_weights: (called.append(name), call(name, *rest))[1]
    )
    for name in METHODS:
        weights(monkeypatch, "cpu", name, torch.eye(3, dtype=torch.float64))
    assert called == [name.partition(",")[0].replace("nash", "fairness") for name in METHODS]


def test_no_library_no_answers(monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "eager")
    assert kernels.method_weights("frank_wolfe", torch.eye(2).double(), (0.1, 1.0), None) is None


def test_an_unknown_solver_is_refused(monkeypatch):
    monkeypatch.setitem(cpu.abi.SOLVERS, "nothing", 99)
    with pytest.raises(ValueError, match="fpg_cpu_method_weights"):
        cpu.method_weights("nothing", torch.eye(2).double(), (0.1, 1.0), None)


def test_a_task_that_enters_by_rounding_alone_is_not_the_end():
    """Two of these gradients of rank 2 are nearly one: a third one's pivot is rounding, and may cancel to zero."""
    rows = torch.tensor(
        [
            [1.3472011235341788, 0.803483268055273],
            [0.11738571679881595, 0.8198224957174882],
            [0.27259721893946437, 0.18401116461725195],
            [0.12561748292705094, -0.07207959214296857],
            [0.3951169486627409, 1.269602389524616],
            [-0.3341837341998276, 0.2010130292453102],
            [-1.114122326415766, 1.594688186378302],
        ],
        dtype=torch.float64,
    )
    norms = rows.norm(dim=1)
    for seed in range(200):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        given = rows[order]
        projected = kernels.method_weights("project_each", given @ given.mT, (0.0, 0.0), None) @ given
        assert float((projected @ (given / norms[order, None]).mT).min()) > -1e-6, seed


def test_very_different_gradients_and_a_small_alpha(monkeypatch):
    """The solution is there, though powers of the norms leave the range of numbers."""
    for matrix, alpha in (([[9e6, 300.0], [300.0, 1.0]], 0.01), ([[1e36, 0.0], [0.0, 1.0]], 0.05)):
        gram_matrix = torch.tensor(matrix, dtype=torch.float64)
        for backend in ("cpu", "eager"):
            monkeypatch.setenv("FASTPCGRAD_BACKEND", backend)
            found = methods.FairGrad(alpha=alpha).weights(gram_matrix)
            # G w = w^(-1/alpha), by logarithms
            torch.testing.assert_close((gram_matrix @ found).log(), -found.log() / alpha, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-310, 1e-300, 1e300])
def test_the_scale_of_the_trace_does_not_matter(scale):
    matrix = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64) * scale
    near = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(
        methods.MGDA(solver="exact").weights(matrix), torch.tensor([0.8, 0.2], dtype=torch.float64), **near
    )
    expected = methods.CAGrad(c=0.5).weights(matrix / scale)
    torch.testing.assert_close(methods.CAGrad(c=0.5).weights(matrix), expected, **near)


@pytest.mark.parametrize("make", [methods.UPGrad, methods.DualProj, methods.AlignedMTL, methods.ConFIG])
def test_preferences_that_are_changed_are_followed(make):
    matrix, other = gram(random_rows(2, 3, 3)), torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    method = make(pref_vector=[1.0, 1.0, 1.0])
    method.weights(matrix)
    method.pref_vector = other
    assert torch.equal(method.weights(matrix), make(pref_vector=other).weights(matrix))
    method.pref_vector[0] = 3.0
    assert torch.equal(method.weights(matrix), make(pref_vector=[3.0, 1.0, 5.0]).weights(matrix))
