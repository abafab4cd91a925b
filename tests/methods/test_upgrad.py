"""UPGrad: TorchJD's numbers, no conflict, hand-worked cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpcgrad.methods.upgrad import UPGrad
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
        oracle = aggregation.UPGradWeighting(preferences, torchjd.QuadprogProjector(norm_eps=0.0))
        expected = oracle(gram(rows))
        weights = UPGrad(preferences).weights(gram(rows))
        assert error(weights @ rows, expected @ rows, weights, rows) <= 1e-9, seed
        compared += 1
    assert compared >= 200


@given(seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_it_conflicts_with_no_task(seed):
    rows = random_rows(seed)
    weights = UPGrad(reg_eps=0.0).weights(gram(rows))
    scale = float((weights.abs() * rows.norm(dim=1)).sum())
    assert ((rows @ (weights @ rows)) >= -1e-10 * scale * rows.norm(dim=1)).all()


def test_the_regularisation_bounds_what_conflict_is_left():
    """G'v ≥ 0 with G' = G / tr G + ε I leaves J (vJ) ≥ −ε v tr G."""
    for seed in range(50):
        rows = random_rows(seed)
        weights = UPGrad(reg_eps=1e-2).weights(gram(rows))
        left = 1e-2 * weights * gram(rows).trace()
        assert ((rows @ (weights @ rows)) >= -left * (1 + 1e-9)).all()


def test_without_conflict_it_is_the_mean():
    gram = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(UPGrad().weights(gram), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_two_opposites_and_a_third_by_hand():
    """(1, 0) and (-1, 0) project to zero, (1, 1) to (0, 1)."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    merged = UPGrad([1.0, 1.0, 1.0], reg_eps=0.0).weights(gram(rows)) @ rows
    torch.testing.assert_close(merged, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_zero_gradients_keep_their_preferences():
    weights = UPGrad([0.2, 0.8]).weights(torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.8], dtype=torch.float64))


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_batch(tasks):
    check_batch(UPGrad(), tasks)


@pytest.mark.parametrize("tasks", [1, 4])
def test_what_is_not_finite_stays_in_its_problem(tasks):
    check_broken(UPGrad(), tasks)


def test_scales():
    check_scales(UPGrad(), 5)


def test_norm_eps_takes_small_gradients_for_zero():
    conflict = 1e-6 * torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    assert UPGrad(norm_eps=1e-4).weights(conflict).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pref_vector": "equal"}, TypeError, ["pref_vector", "equal"]),
        ({"pref_vector": [[1.0]]}, ValueError, ["pref_vector", "[1, 1]"]),
        ({"pref_vector": []}, ValueError, ["pref_vector", "[0]"]),
        ({"pref_vector": [1.0, float("nan")]}, ValueError, ["pref_vector", "nan"]),
        ({"norm_eps": -1.0}, ValueError, ["norm_eps", "-1.0"]),
        ({"reg_eps": float("nan")}, ValueError, ["reg_eps", "nan"]),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        UPGrad(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_preferences_of_another_number_of_tasks():
    with pytest.raises(ValueError, match=r"pref_vector has 2 .* found 3"):
        UPGrad([1.0, 1.0]).weights(torch.eye(3, dtype=torch.float64))


def test_preferences_are_copied():
    preferences = torch.ones(2, dtype=torch.float64)
    method = UPGrad(preferences)
    preferences.zero_()
    assert method.weights(torch.eye(2, dtype=torch.float64)).tolist() == [1.0, 1.0]


def test_repr():
    assert repr(UPGrad([1, 2])) == "UPGrad(pref_vector=[1.0, 2.0], norm_eps=0.0, reg_eps=0.0001)"
