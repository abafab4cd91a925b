"""MGDA: the shortest convex combination of the task gradients, and Frank-Wolfe towards it."""

from functools import partial

import pytest
import torch

from fastpcgrad import reference
from fastpcgrad.methods.mgda import MGDA
from tests.methods import contract
from tests.methods.matrices import difference, gram, jacobian, jacobians
from tests.methods.random_rows import random_rows

exact = partial(MGDA, solver="exact")
for_each_solver = pytest.mark.parametrize("make", [MGDA, exact], ids=["frank-wolfe", "exact"])


@pytest.mark.parametrize("arguments", [{}, {"epsilon": 1e-5, "max_iters": 17}])
def test_it_is_torchjds(arguments):
    theirs = pytest.importorskip("torchjd.aggregation").MGDAWeighting(**arguments)
    compared = 0
    for name, rows in jacobians(seeds=range(2)):
        expected = theirs(gram(rows))
        assert difference(rows, MGDA(**arguments).weights(gram(rows)), expected) <= 1e-9, name
        compared += 1
    assert compared >= 200


@pytest.mark.parametrize("tasks", [32, 64])
def test_the_exact_solver_reaches_the_minimum_of_many_tasks(tasks, solver):
    """Necessary and sufficient: α ≥ 0, Σα = 1 and g_j·d ≥ ‖d‖² for all j."""
    rows = random_rows(tasks, tasks, tasks, ("conflicting",))
    weights = exact().weights(gram(rows))
    assert float(weights.min()) >= 0 and float(weights.sum()) == pytest.approx(1, abs=1e-12)
    merged = weights @ rows
    assert float(merged @ merged - (rows @ merged).min()) <= 1e-13 * float(gram(rows).trace())


def test_frank_wolfe_approaches_the_minimum():
    """Its excess ‖d‖² − min falls at least as 2 diameter²/steps; here to a 30th from 100 to 10 000 steps."""
    excess = {100: 0.0, 10_000: 0.0}
    for seed in range(10):
        rows = jacobian("conflicting", 6, seed)
        shortest = reference.mgda(rows)
        least = shortest @ gram(rows) @ shortest
        for steps in excess:
            weights = MGDA(1e-12, steps).weights(gram(rows))
            over = float(weights @ gram(rows) @ weights - least)
            assert -1e-12 <= over <= 2 * float(torch.cdist(rows, rows).max()) ** 2 / steps
            excess[steps] += over
    assert excess[10_000] < excess[100] / 30


def test_two_tasks_by_hand():
    """G = diag(1, 4): the point of the segment nearest to zero, (4/5, 1/5)."""
    found = MGDA().weights(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))
    torch.testing.assert_close(found, torch.tensor([0.8, 0.2], dtype=torch.float64))


def test_one_long_gradient_among_short_ones_gets_no_weight():
    """The others point the same way and are shorter: the shortest combination is the shortest of them."""
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [50.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(MGDA().weights(gram(rows)), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


@for_each_solver
def test_a_batch_is_a_loop(make):
    contract.check_batch_is_a_loop(make)


@for_each_solver
def test_not_finite(make):
    contract.check_not_finite_stays_in_its_problem(make)


@for_each_solver
def test_scaled_gradients_give_the_same_weights(make):
    contract.check_scaled_gradients_give_the_same_weights(make)


def test_bad_grams_are_refused():
    contract.check_bad_grams_are_refused(MGDA)


def test_in_a_surgery():
    contract.check_surgery(MGDA)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"epsilon": 0.0}, ["epsilon", "0.0"]),
        ({"epsilon": float("nan")}, ["epsilon", "nan"]),
        ({"max_iters": 0}, ["max_iters", "0"]),
        ({"solver": "newton"}, ["solver", "newton", "frank-wolfe", "exact"]),
    ],
)
def test_bad_arguments_name_what_was_found(arguments, words):
    with pytest.raises(ValueError) as caught:
        MGDA(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_it_has_no_state_and_says_what_it_is():
    assert MGDA().state_dict() == {} and repr(MGDA()) == "MGDA(epsilon=0.001, max_iters=100, solver='frank-wolfe')"
