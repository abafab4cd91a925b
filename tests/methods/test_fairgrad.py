"""FairGrad: G w = w^(−1/α) with w > 0."""

from functools import partial

import numpy as np
import pytest
import torch

from fastpcgrad.methods.fairgrad import FairGrad
from tests.methods import contract
from tests.methods.matrices import difference, gram, jacobian, jacobians
from tests.methods.properties import given, integer_rows, prop, st

make = partial(FairGrad, alpha=2.0)
SOLVABLE = ("independent", "conflicting", "duplicate")


def mismatch(grams, weights, alpha):
    """max_i |(G w)_i / w_i^(−1/α) − 1|."""
    return float(((grams @ weights) * weights ** (1 / alpha) - 1).abs().max())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_it_is_torchjds(alpha):
    """Where TorchJD's solver has found a solution: it starts from 1/T, too far off at other scales. Where task
    gradients oppose each other or one is zero there is none."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("scipy")
    compared = 0
    for name, rows in jacobians(kinds=SOLVABLE, seeds=range(4), scales=(0.1, 1.0, 10.0)):
        expected = torchjd.FairGradWeighting(alpha)(gram(rows))
        if mismatch(gram(rows), expected, alpha) > 1e-6:
            continue
        assert difference(rows, FairGrad(alpha).weights(gram(rows)), expected) <= 1e-5, name
        compared += 1
    assert compared >= 200


@given(integer_rows(), st.sampled_from([0.5, 1.0, 2.0]))
@prop
def test_weights_are_finite_and_positive_whatever_the_gradients(rows, alpha):
    """Also at Pareto-stationary points; only a task without gradient gets 0."""
    weights = FairGrad(alpha).weights(gram(rows))
    assert bool(weights.isfinite().all())
    assert torch.equal(weights > 0, rows.any(dim=1))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_two_tasks_by_hand(alpha):
    """G = diag(1, 4): 4 x = x^(−1/α) gives x = 4^(−α/(1 + α))."""
    found = FairGrad(alpha).weights(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))
    torch.testing.assert_close(found, torch.tensor([1.0, 4 ** (-alpha / (1 + alpha))], dtype=torch.float64))


def test_no_fairness_is_linear_scalarisation():
    grams = gram(jacobian("conflicting", 4, seed=0))
    torch.testing.assert_close(FairGrad(0.0).weights(grams), torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scaled_gradients_scale_the_weights_as_in_the_paper(alpha, scale):
    rows = jacobian("conflicting", 4, seed=2)
    expected = FairGrad(alpha).weights(gram(rows)) * scale ** (-2 * alpha / (1 + alpha))
    torch.testing.assert_close(FairGrad(alpha).weights(gram(scale * rows)), expected, rtol=1e-9, atol=0)


def test_few_iterations_give_an_iterate_that_is_not_there_yet():
    lengths = torch.tensor([1e-2, 1.0, 1e2], dtype=torch.float64)
    grams = gram(lengths[:, None] * jacobian("conflicting", 3, seed=1))
    assert mismatch(grams, FairGrad(2.0, max_iters=1).weights(grams), 2.0) > 1e-3
    assert mismatch(grams, FairGrad(2.0).weights(grams), 2.0) <= 1e-10


def test_a_batch_is_a_loop():
    contract.check_batch_is_a_loop(make)


def test_not_finite():
    contract.check_not_finite_stays_in_its_problem(make)


def test_bad_grams_are_refused():
    contract.check_bad_grams_are_refused(make)


def test_in_a_surgery():
    contract.check_surgery(make)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alpha": -1.0}, ["alpha", "-1.0"]),
        ({"alpha": np.inf}, ["alpha", "inf"]),
        ({"alpha": 1.0, "max_iters": 0}, ["max_iters", "0"]),
    ],
)
def test_bad_arguments_name_what_was_found(arguments, words):
    with pytest.raises(ValueError) as caught:
        FairGrad(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_it_has_no_state_and_says_what_it_is():
    assert FairGrad().alpha == 1
    assert make().state_dict() == {} and repr(make()) == "FairGrad(alpha=2.0, max_iters=100)"
