"""The methods' solvers and GradVac's turns by a warp of a GPU, or of its emulation.

Against the oracles; and, for more tasks than these take, against a thread of the CPU, which runs the same sources and
is itself compared with the oracles.
"""

import pytest
import torch

from fastpcgrad.backends import abi, cpu, cuda
from tests.backends.cuda_emulated import CXX, DEVICE, GPU
from tests.methods.oracles import CASES, PREFERRED, answers
from tests.methods.random_rows import error, gram, random_rows

pytestmark = [
    pytest.mark.skipif(not (GPU or CXX), reason="needs a GPU with the CUDA library, or a C++ compiler"),
    pytest.mark.usefixtures("poisoned_memory", "library"),
]

PARAMETERS = {
    "frank_wolfe": (1e-3, 100.0),
    "shortest_point": (0.0, 0.0),
    "conflict_averse": (0.5, 1e-4),
    "fairness": (1.0, 100.0),
    "project_each": (0.0, 1e-4),
    "project_one": (0.0, 0.0),
    "aligned": (0.0, 2.0**-52),
    "impartial": (0.0, 0.0),
    "conflict_free": (0.0, 0.0),
}
on_each_solver = pytest.mark.parametrize("name", PARAMETERS)


def test_every_solver_is_tested():
    assert set(PARAMETERS) == set(ORACLES) == set(abi.SOLVERS)


def assert_agree(name, rows, preference=None):
    """What the answers combine the rows to, as a part of Σ |w_t| ‖g_t‖."""
    matrices = torch.stack([gram(one) for one in rows]) if isinstance(rows, list) else gram(rows)
    expected = cpu.method_weights(name, matrices, PARAMETERS[name], preference)
    there = None if preference is None else preference.to(DEVICE)
    found = cuda.method_weights(name, matrices.to(DEVICE), PARAMETERS[name], there).cpu()
    assert found.shape == expected.shape
    for one, mine, wanted in zip(rows if isinstance(rows, list) else [rows], found, expected, strict=False):
        scale = (wanted.abs() @ one.norm(dim=1)).clamp_min(1e-300)
        assert (((mine - wanted) @ one).norm(dim=-1) <= 1e-12 * scale).all()


ORACLES = {
    "frank_wolfe": "MGDA",
    "shortest_point": "MGDA, exact",
    "conflict_averse": "CAGrad",
    "fairness": "NashMTL, whole",
    "project_each": "UPGrad",
    "project_one": "DualProj, exact",
    "aligned": "AlignedMTL",
    "impartial": "IMTLG",
    "conflict_free": "ConFIG, preferred",
}


@on_each_solver
def test_the_merged_gradient_is_the_oracles(name):
    case = CASES[ORACLES[name]]
    for tasks in (1, 2, 5, 10):
        known = [answer for answer in answers(ORACLES[name]) if len(answer[0]) == tasks]
        matrices = torch.stack([gram(rows) for rows, _, _ in known]).to(DEVICE)
        preference = torch.tensor(PREFERRED[:tasks], dtype=torch.float64, device=DEVICE) if case.preferred else None
        found = cuda.method_weights(name, matrices, PARAMETERS[name], preference).cpu()
        found = found.sum(dim=1) if name == "project_each" else found
        for weights, (rows, expected, allowed) in zip(found, known, strict=True):
            assert error(weights @ rows, expected @ rows, expected, rows) <= allowed


@pytest.mark.parametrize("name", ["project_one", "project_each"])
@pytest.mark.parametrize("distance", [1e-3, 1e-5, 1e-6])
def test_task_gradients_that_almost_depend_on_each_other(name, distance):
    """What lies further than about 1e-7 from the span of others counts: v J conflicts with no task."""
    for seed in range(10):
        rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows[2] = -(rows[0] + rows[1]) + distance * rows[2]
        rows[3] = rows[0] - rows[1] + distance * rows[3]
        v = cuda.method_weights(name, gram(rows).to(DEVICE), (0.0, 0.0), None).cpu()
        scale = v.abs() @ rows.norm(dim=1, keepdim=True) * rows.norm(dim=1)
        assert bool((v @ gram(rows) >= -1e-10 * scale).all()), seed


@pytest.fixture(autouse=True)
def _jacobi_for_all(monkeypatch):
    """On the CPU too, where LAPACK would take over."""
    monkeypatch.setattr(cpu, "_LARGEST_BY_JACOBI", 64)


@on_each_solver
@pytest.mark.parametrize("tasks", [31, 33])
def test_more_and_less_tasks_than_lanes(name, tasks):
    rows = torch.randn(tasks, 40, generator=torch.Generator().manual_seed(tasks), dtype=torch.float64)
    assert_agree(name, [rows - 0.9 * rows.mean(dim=0)])


@pytest.mark.parametrize("name", ["project_each", "project_one", "aligned", "conflict_free"])
def test_preferences(name):
    rows = [random_rows(seed, 4, 4) for seed in range(9)]
    assert_agree(name, rows, torch.tensor([0.5, 2.0, 0.0, -1.0], dtype=torch.float64))


@on_each_solver
def test_what_is_not_finite_is_nan_in_its_problem_alone(name):
    matrices = torch.stack([gram(random_rows(seed, 3, 3)) for seed in range(3)])
    matrices[1, 2, 0] = matrices[1, 0, 2] = torch.nan
    found = cuda.method_weights(name, matrices.to(DEVICE), PARAMETERS[name], None)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@on_each_solver
def test_a_single_problem_and_none(name):
    matrix = gram(random_rows(0, 3, 3)).to(DEVICE)
    one = cuda.method_weights(name, matrix, PARAMETERS[name], None)
    assert one.shape == ((3, 3) if name == "project_each" else (3,)) and one.isfinite().all()
    assert len(cuda.method_weights(name, matrix[None][:0], PARAMETERS[name], None)) == 0


@pytest.mark.parametrize(
    ("name", "matrix", "parameters"),
    [
        ("fairness", [[9e6, 300.0], [300.0, 1.0]], (0.01, 100.0)),
        ("fairness", [[1e200, 0.0], [0.0, 1e-200]], (0.005, 100.0)),
        ("frank_wolfe", [[1.69e308, -1.69e308, 1.69e308]] * 3, (1e-3, 100.0)),
        ("shortest_point", [[1.69e308, -1.69e308], [-1.69e308, 1.69e308]], (0.0, 0.0)),
    ],
)
def test_the_lanes_agree_where_numbers_are_left(name, matrix, parameters):
    """What is no number must not send lanes different ways."""
    given = torch.tensor(matrix, dtype=torch.float64)
    expected = cpu.method_weights(name, given, parameters, None)
    found = cuda.method_weights(name, given.to(DEVICE), parameters, None).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_more_answers_than_warps(monkeypatch):
    rows = [random_rows(seed, 2, 2) for seed in range(27)]
    assert_agree("frank_wolfe", rows * (50 if GPU else 1))


def test_large_problems_are_left_to_the_host():
    assert cuda.method_weights("frank_wolfe", torch.eye(65).double().to(DEVICE), (1e-3, 1.0), None) is None


def test_an_unknown_solver_is_refused(monkeypatch):
    monkeypatch.setitem(abi.SOLVERS, "nothing", 99)
    with pytest.raises((ValueError, RuntimeError)):
        cuda.method_weights("nothing", torch.eye(2).double().to(DEVICE), (0.1, 1.0), None)


@pytest.mark.parametrize("tasks", [1, 2, 7, 33])
def test_gradvac(tasks):
    kinds = ("plain", "common direction", "conflicting", "zero row", "mixed norms")
    matrices = torch.stack([gram(random_rows(seed, tasks, tasks, kinds)) for seed in range(5)])
    matrices[3, 0, 0] = torch.nan
    orders = [[t, *(k for k in torch.randperm(tasks).tolist() if k != t)] for _ in range(5) for t in range(tasks)]
    places, targets = torch.tensor(orders), torch.rand(5, tasks, tasks, dtype=torch.float64)
    there = targets.clone().to(DEVICE)
    expected = cpu.gradvac(matrices, places, 0.3, 1e-8, targets)
    found = cuda.gradvac(matrices.to(DEVICE), places.to(DEVICE), 0.3, 1e-8, there)
    torch.testing.assert_close(there.cpu(), targets, rtol=0, atol=1e-13)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert found[3].isnan().all()
    assert cuda.gradvac(matrices[:0].to(DEVICE), places.to(DEVICE), 0.3, 1e-8, there).shape == (0, tasks, tasks)
