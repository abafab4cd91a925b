"""The quadratic program of UPGrad and DualProj: its optimality conditions, on what block pivoting cannot do too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpcgrad.methods import _dual_cone
from tests.methods.random_rows import gram, random_rows


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
@given(seed=st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_optimality_conditions(reg_eps, seed):
    rows = random_rows(seed, max_tasks=12)
    tasks = len(rows)
    lower = torch.cat([torch.eye(tasks), torch.ones(1, tasks), torch.randn(3, tasks)]).double()
    values = _dual_cone.project(gram(rows), lower, 0.0, reg_eps)
    assert violation(prepared(gram(rows), reg_eps), lower, values) <= 1e-10


@pytest.mark.parametrize("reg_eps", [0.0, 1e-4])
@pytest.mark.parametrize("rank", [3, 16, 31, 32])
def test_many_tasks_and_few_dimensions(reg_eps, rank):
    """Half of 32 tasks change sides, and there block pivoting cycles on some."""
    rows = torch.randn(32, rank, dtype=torch.float64)
    lower = torch.cat([torch.eye(32), torch.ones(1, 32)]).double()
    values = _dual_cone.project(gram(rows), lower, 0.0, reg_eps)
    assert violation(prepared(gram(rows), reg_eps), lower, values) <= 1e-10


@pytest.mark.parametrize("reg_eps", [0.0, 1e-4])
def test_either_method_alone_finds_the_same_projection(reg_eps, monkeypatch):
    for seed in range(60):
        rows = random_rows(seed)
        lower = torch.eye(len(rows)).double()
        both = _dual_cone.project(gram(rows), lower, 0.0, reg_eps) @ rows
        with monkeypatch.context() as patch:
            patch.setattr(_dual_cone, "_BLOCK_ROUNDS", 0)
            values = _dual_cone.project(gram(rows), lower, 0.0, reg_eps)
        assert violation(prepared(gram(rows), reg_eps), lower, values) <= 1e-10
        assert float((values @ rows - both).norm()) <= 1e-9 * float((values.abs() @ rows.norm(dim=1)).sum())


def test_it_is_the_nearest_vector_that_conflicts_with_none():
    """Hand-worked: g_1 = (1, 0), g_2 = (-1, 1). The cone of no conflict is x ≥ 0, y ≥ x; g_1 goes to (½, ½)."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    values = _dual_cone.project(gram(rows), torch.eye(2, dtype=torch.float64), 0.0, 0.0)
    torch.testing.assert_close(values @ rows, torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64))


def test_a_trace_that_is_not_above_norm_eps_counts_as_zero():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    lower = torch.eye(2, dtype=torch.float64)
    assert torch.equal(_dual_cone.project(gram(rows), lower, norm_eps=3.0, reg_eps=1e-4), lower)
    assert not torch.equal(_dual_cone.project(gram(rows), lower, norm_eps=2.9, reg_eps=1e-4), lower)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12])
def test_task_gradients_that_are_almost_opposite(distance):
    """What counts as dependent is left with a conflict of its distance from the others, at most about 1e-7."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [-1.0, distance, 0.0], [0.3, 0.1, 1.0]], dtype=torch.float64)
    lower = torch.eye(3, dtype=torch.float64)
    exact = _dual_cone.project(gram(rows), lower, 0.0, 0.0)
    assert violation(prepared(gram(rows), 0.0), lower, exact) <= (1e-10 if distance >= 1e-6 else 2e-7)
    regular = _dual_cone.project(gram(rows), lower, 0.0, 1e-4)
    assert violation(prepared(gram(rows), 1e-4), lower, regular) <= 1e-10
