"""The quadratic program of UPGrad and DualProj, on what block pivoting cannot do too, and what both of them share."""

import pytest
import torch

from fastpcgrad import reference
from fastpcgrad.backends import kernels
from fastpcgrad.methods import DualProj, UPGrad
from fastpcgrad.methods.solvers import dual_cone
from tests.methods.random_rows import HARD, KINDS, check_batch, check_broken, check_scales, error, gram, random_rows

for_both_methods = pytest.mark.parametrize("method", [UPGrad, DualProj])


@pytest.fixture
def project_each(solver):
    """Projects the vector of each task: (G, reg_eps) → v ``[T, T]``."""
    if solver == "numpy":
        return lambda matrix, reg_eps: dual_cone.project(matrix, torch.eye(len(matrix)).double(), 0.0, reg_eps)
    return lambda matrix, reg_eps: kernels.method_weights(
        "project_each", matrix, (0.0, reg_eps), torch.ones(len(matrix), dtype=torch.float64)
    )


def violation(matrix, lower, values):
    """How far v is from v ≥ u, Gv ≥ 0 and (v − u) · Gv = 0, with task gradients of norm 1 and Σ |v_t| ‖g_t‖ as unit."""
    norms = matrix.diagonal().sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    unit, v, u = matrix / norms / norms[:, None], values * norms, lower * norms
    scale = v.abs().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    gradient, slack = v @ unit / scale, (v - u) / scale
    return float(torch.stack([-gradient, -slack, torch.minimum(gradient, slack).abs()]).max())


def prepared(matrix, reg_eps):
    trace = matrix.trace()
    return matrix / trace + reg_eps * torch.eye(len(matrix), dtype=torch.float64) if trace > 0 else matrix


@pytest.mark.parametrize("reg_eps", [0.0, 1e-4])
@pytest.mark.parametrize("rank", [3, 16, 31, 32])
def test_many_tasks_and_few_dimensions(reg_eps, rank, project_each):
    """Half of 32 tasks change sides, and there block pivoting cycles on some."""
    rows = torch.randn(32, rank, dtype=torch.float64)
    values = project_each(gram(rows), reg_eps)
    assert violation(prepared(gram(rows), reg_eps), torch.eye(32).double(), values) <= 1e-12


def one_loss_a_sample(tasks):
    """Gradients of single samples' losses of a layer of 40 weights: correlated, and at most 40 are independent."""
    inputs = torch.randn(tasks, 40, dtype=torch.float64).relu()
    return inputs * torch.randn(tasks, 1, dtype=torch.float64)


@pytest.mark.parametrize("reg_eps", [0.0, 1e-4])
def test_hundreds_of_tasks(reg_eps):
    """Each in a compiled library too, of which a problem takes milliseconds there."""
    for method, tasks in ((UPGrad, 96), (DualProj, 256)):
        rows = one_loss_a_sample(tasks)
        matrix, preferred = gram(rows), torch.full((tasks,), 1 / tasks, dtype=torch.float64)
        each = method is UPGrad
        values = kernels.method_weights("project_each" if each else "project_one", matrix, (0.0, reg_eps), preferred)
        if values is None:
            pytest.skip("there is no compiled library")
        lower = preferred.diag() if each else preferred
        assert violation(prepared(matrix, reg_eps), lower, values) <= 1e-12
        torch.testing.assert_close(method(reg_eps=reg_eps).weights(matrix), values.sum(dim=0) if each else values)


MANY = {
    "few dimensions": lambda tasks: torch.randn(tasks, 3, dtype=torch.float64),
    "samples": one_loss_a_sample,
    "pairs that are almost opposite": lambda tasks: torch.cat(
        [half := torch.randn(tasks // 2, 40, dtype=torch.float64), 1e-6 * torch.randn_like(half) - half]
    ),
    "conflicting": lambda tasks: (rows := torch.randn(tasks, tasks + 5, dtype=torch.float64)) - 0.99 * rows.mean(dim=0),
    "of all lengths": lambda tasks: (
        torch.randn(tasks, 60, dtype=torch.float64) * 10 ** torch.linspace(-10, 10, tasks, dtype=torch.float64)[:, None]
    ),
    "signs, and zeros": lambda tasks: (
        torch.randn(tasks, 20, dtype=torch.float64).sign() * (torch.arange(tasks) % 7 > 0)[:, None]
    ),
}


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("reg_eps", [0.0, 1e-8, 1e-4])
@pytest.mark.parametrize("tasks", [40, dual_cone.LARGE + 2])
def test_many_tasks_in_step_and_one_by_one(kind, reg_eps, tasks):
    for seed in range(3):
        torch.manual_seed(seed)
        matrix = gram(MANY[kind](tasks))
        lower = torch.eye(tasks, dtype=torch.float64)[seed::9] * torch.rand(tasks)
        values = dual_cone.project(matrix, lower, 0.0, reg_eps)
        assert violation(prepared(matrix, reg_eps), lower, values) <= 1e-13, seed


def test_many_tasks_in_batches_with_what_is_not_finite():
    tasks = dual_cone.LARGE + 1
    matrices = torch.stack([gram(one_loss_a_sample(tasks)) for _ in range(3)])
    matrices[1, 0, 3] = torch.inf
    found = DualProj().weights(matrices)
    assert found[1].isnan().all()
    for place in (0, 2):
        assert torch.equal(found[place], DualProj().weights(matrices[place]))
    zeros = torch.zeros(tasks, tasks, dtype=torch.float64)
    torch.testing.assert_close(UPGrad().weights(zeros), torch.full((tasks,), 1 / tasks, dtype=torch.float64))


def test_a_thousand_tasks():
    rows = one_loss_a_sample(1024)
    weights = DualProj(reg_eps=0.0).weights(gram(rows))
    preferred = torch.full((1024,), 1 / 1024, dtype=torch.float64)
    assert violation(prepared(gram(rows), 0.0), preferred, weights) <= 1e-13


@for_both_methods
@pytest.mark.parametrize("reg_eps", [1e-4, 1e-2])
def test_what_a_regularised_projection_lets_through_is_bounded(method, reg_eps):
    harmed = 0
    for seed in range(200):
        rows = random_rows(seed, kinds=KINDS + HARD)
        weights = method(reg_eps=reg_eps).weights(gram(rows))
        products, squared = rows @ (weights @ rows), float(rows.square().sum())
        allowed = reg_eps * squared * weights + 1e-13 * rows.norm(dim=1) * (weights.abs() * rows.norm(dim=1)).sum()
        assert (products >= -allowed).all(), seed
        harmed += bool((products < -1e-3 * allowed).any())
    assert harmed > 20


@pytest.mark.parametrize("reg_eps", [0.0, 1e-4])
def test_without_block_pivoting_it_is_the_oracles_too(reg_eps, monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "eager")
    monkeypatch.setattr(dual_cone, "_BLOCK_ROUNDS", 0)
    for seed in range(66):
        rows = random_rows(seed, max_tasks=5, kinds=KINDS + HARD)
        expected, found = reference.upgrad(rows, reg_eps=reg_eps), UPGrad(reg_eps=reg_eps).weights(gram(rows))
        assert error(found @ rows, expected @ rows, expected, rows) <= 1e-12, seed


def test_it_is_the_nearest_vector_that_conflicts_with_none():
    """Hand-worked: g_1 = (1, 0), g_2 = (-1, 1). The cone of no conflict is x ≥ 0, y ≥ x; g_1 goes to (½, ½)."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    values = dual_cone.project(gram(rows), torch.eye(2, dtype=torch.float64), 0.0, 0.0)
    torch.testing.assert_close(values @ rows, torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64))


def test_a_trace_that_is_not_above_norm_eps_counts_as_zero():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    lower = torch.eye(2, dtype=torch.float64)
    assert torch.equal(dual_cone.project(gram(rows), lower, norm_eps=3.0, reg_eps=1e-4), lower)
    assert not torch.equal(dual_cone.project(gram(rows), lower, norm_eps=2.9, reg_eps=1e-4), lower)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12])
def test_task_gradients_that_are_almost_opposite(distance, project_each):
    """What counts as dependent is left with a conflict of its distance from the others, at most about 1e-7."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [-1.0, distance, 0.0], [0.3, 0.1, 1.0]], dtype=torch.float64)
    lower = torch.eye(3, dtype=torch.float64)
    exact = project_each(gram(rows), 0.0)
    assert violation(prepared(gram(rows), 0.0), lower, exact) <= (1e-10 if distance >= 1e-6 else 2e-7)
    regular = project_each(gram(rows), 1e-4)
    assert violation(prepared(gram(rows), 1e-4), lower, regular) <= 1e-10


@pytest.mark.parametrize(("tasks", "distance"), [(4, 1e-3), (4, 1e-6), (7, 1e-2), (7, 1e-4), (7, 1e-6), (12, 1e-6)])
def test_task_gradients_that_almost_depend_on_each_other(tasks, distance, project_each):
    """What lies further than about 1e-7 from the span of others counts, and conflicts with no answer."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(tasks, tasks + 2, generator=generator, dtype=torch.float64)
        rows[2] = -(rows[0] + rows[1]) + distance * rows[2]
        rows[3] = rows[0] - rows[1] + distance * rows[3]
        matrix = gram(rows)
        values = project_each(matrix, 0.0)
        assert violation(prepared(matrix, 0.0), torch.eye(tasks).double(), values) <= 1e-13, seed


@for_both_methods
@pytest.mark.parametrize("with_preferences", [False, True])
def test_the_methods_are_torchjds(method, with_preferences):
    """All random matrices but those of zeros alone: without its norm_eps TorchJD divides by their norm."""
    pytest.importorskip("quadprog")
    torchjd = pytest.importorskip("torchjd.linalg")
    weighting = getattr(pytest.importorskip("torchjd.aggregation"), f"{method.__name__}Weighting")
    compared = 0
    for seed in range(230):
        rows = random_rows(seed)
        if not rows.any():
            continue
        preferences = torch.rand(len(rows), dtype=torch.float64) if with_preferences else None
        expected = weighting(preferences, torchjd.QuadprogProjector(norm_eps=0.0))(gram(rows))
        weights = method(preferences).weights(gram(rows))
        assert error(weights @ rows, expected @ rows, weights, rows) <= 1e-9, seed
        compared += 1
    assert compared >= 200


@for_both_methods
def test_zero_gradients_keep_their_preferences(method):
    weights = method([0.2, 0.8]).weights(torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.8], dtype=torch.float64))


@for_both_methods
def test_norm_eps_takes_small_gradients_for_zero(method):
    conflict = 1e-6 * torch.tensor([[1.0, -2.0], [-2.0, 8.0]], dtype=torch.float64)
    assert method(norm_eps=1e-4).weights(conflict).tolist() == [0.5, 0.5]
    assert method().weights(conflict).tolist() != [0.5, 0.5]


@for_both_methods
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_batch(method, tasks):
    check_batch(method(), tasks)


@for_both_methods
@pytest.mark.parametrize("tasks", [1, 4])
def test_what_is_not_finite_stays_in_its_problem(method, tasks):
    check_broken(method(), tasks)


@for_both_methods
def test_scales(method):
    check_scales(method(), 5)


@for_both_methods
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pref_vector": "equal"}, TypeError, ["pref_vector", "equal"]),
        ({"pref_vector": 3}, ValueError, ["pref_vector", "[]"]),
        ({"pref_vector": [[1.0]]}, ValueError, ["pref_vector", "[1, 1]"]),
        ({"pref_vector": []}, ValueError, ["pref_vector", "[0]"]),
        ({"pref_vector": [1.0, float("nan")]}, ValueError, ["pref_vector", "nan"]),
        ({"pref_vector": [1.0, float("inf")]}, ValueError, ["pref_vector", "inf"]),
        ({"norm_eps": -1.0}, ValueError, ["norm_eps", "-1.0"]),
        ({"norm_eps": float("nan")}, ValueError, ["norm_eps", "nan"]),
        ({"reg_eps": -1e-9}, ValueError, ["reg_eps", "-1e-09"]),
        ({"reg_eps": float("nan")}, ValueError, ["reg_eps", "nan"]),
    ],
)
def test_bad_arguments(method, arguments, error, words):
    with pytest.raises(error) as caught:
        method(**arguments)
    assert all(word in str(caught.value) for word in words)


@for_both_methods
def test_preferences_of_another_number_of_tasks(method):
    with pytest.raises(ValueError, match=r"pref_vector has 2 .* found 3"):
        method([1.0, 1.0]).weights(torch.eye(3, dtype=torch.float64))


@for_both_methods
def test_preferences_are_copied(method):
    preferences = torch.ones(2, dtype=torch.float64)
    made = method(preferences)
    preferences.zero_()
    assert made.weights(torch.eye(2, dtype=torch.float64)).tolist() == [1.0, 1.0]
