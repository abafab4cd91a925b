"""DualProj: TorchJD's numbers, no conflict, hand-worked cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpcgrad.methods.dualproj import DualProj
from tests.methods.random_rows import check_batch, check_broken, check_scales, error, gram, random_rows


@pytest.mark.parametrize("with_preferences", [False, True])
def test_equals_torchjd(with_preferences):
    """All random matrices but those of zeros alone: without its norm_eps TorchJD divides by their norm."""
    pytest.importorskip("quadprog")
    torchjd = pytest.importorskip("torchjd.linalg")
    aggregation = pytest.importorskip("torchjd.aggregation")
    compared = 0
    for seed in range(230):
        rows = random_rows(seed)
        if not rows.any():
            continue
        preferences = torch.rand(len(rows), dtype=torch.float64) if with_preferences else None
        oracle = aggregation.DualProjWeighting(preferences, torchjd.QuadprogProjector(norm_eps=0.0))
        expected = oracle(gram(rows))
        weights = DualProj(preferences).weights(gram(rows))
        assert error(weights @ rows, expected @ rows, weights, rows) <= 1e-9, seed
        compared += 1
    assert compared >= 200


@given(seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_it_conflicts_with_no_task_and_is_the_nearest_such(seed):
    """The projection p of m onto a convex cone: p in the cone and (m − p) ⟂ p."""
    rows = random_rows(seed)
    weights = DualProj(reg_eps=0.0).weights(gram(rows))
    merged = weights @ rows
    scale = float((weights.abs() * rows.norm(dim=1)).sum())
    assert ((rows @ merged) >= -1e-10 * scale * rows.norm(dim=1)).all()
    assert abs(float((rows.mean(dim=0) - merged) @ merged)) <= 1e-10 * scale**2


def test_by_hand():
    """The mean of (1, 0) and (-3, 1) is (-1, ½), which conflicts with the first: it goes to (0, ½)."""
    rows = torch.tensor([[1.0, 0.0], [-3.0, 1.0]], dtype=torch.float64)
    weights = DualProj(reg_eps=0.0).weights(gram(rows))
    torch.testing.assert_close(weights, torch.tensor([1.5, 0.5], dtype=torch.float64))


def test_zero_gradients_keep_their_preferences():
    weights = DualProj([0.2, 0.8]).weights(torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.8], dtype=torch.float64))


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_batch(tasks):
    check_batch(DualProj(), tasks)


@pytest.mark.parametrize("tasks", [1, 4])
def test_what_is_not_finite_stays_in_its_problem(tasks):
    check_broken(DualProj(), tasks)


def test_scales():
    check_scales(DualProj(), 5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pref_vector": 3}, ValueError, ["pref_vector", "[]"]),
        ({"pref_vector": [1.0, float("inf")]}, ValueError, ["pref_vector", "inf"]),
        ({"norm_eps": float("nan")}, ValueError, ["norm_eps", "nan"]),
        ({"reg_eps": -1e-9}, ValueError, ["reg_eps", "-1e-09"]),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        DualProj(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_preferences_of_another_number_of_tasks():
    with pytest.raises(ValueError, match=r"pref_vector has 2 .* found 3"):
        DualProj([1.0, 1.0]).weights(torch.eye(3, dtype=torch.float64))


def test_repr():
    assert repr(DualProj()) == "DualProj(pref_vector=None, norm_eps=0.0, reg_eps=0.0001)"
