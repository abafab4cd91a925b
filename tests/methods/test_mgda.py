"""MGDA: the shortest convex combination of the task gradients, and Frank-Wolfe towards it."""

from functools import partial

import pytest
import torch

from fastpcgrad.methods.mgda import MGDA
from tests.methods import contract
from tests.methods.matrices import difference, gram, jacobian, jacobians
from tests.methods.properties import given, integer_rows, prop, st

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


@given(integer_rows(), st.sampled_from([1e-8, 1.0, 1e8]))
@prop
def test_the_exact_solver_reaches_the_minimum(rows, scale):
    """Necessary and sufficient: α ≥ 0, Σα = 1 and g_j·d ≥ ‖d‖² for all j. Exact for duplicates, opposites, zeros."""
    weights = exact().weights(gram(scale * rows))
    assert float(weights.min()) >= 0 and float(weights.sum()) == pytest.approx(1, abs=1e-12)
    merged = weights @ rows
    assert float(merged @ merged - (rows @ merged).min()) <= 1e-13 * float(gram(rows).trace())


def test_frank_wolfe_approaches_what_the_exact_solver_finds():
    """Its excess ‖d‖² − min falls at least as 2 diameter²/steps; here to a 30th from 100 to 10 000 steps."""
    excess = {100: 0.0, 10_000: 0.0}
    for seed in range(10):
        rows = jacobian("conflicting", 6, seed)
        shortest = exact().weights(gram(rows))
        least = shortest @ gram(rows) @ shortest
        for steps in excess:
            weights = MGDA(1e-12, steps).weights(gram(rows))
            over = float(weights @ gram(rows) @ weights - least)
            assert -1e-12 <= over <= 2 * float(torch.cdist(rows, rows).max()) ** 2 / steps
            excess[steps] += over
    assert excess[10_000] < excess[100] / 30


@given(integer_rows())
@prop
def test_no_task_gradient_lies_far_behind_the_merged_one(rows):
    """At the minimum g_j·d ≥ ‖d‖² for all j. With M the longest gradient, a step below ε means a gap
    ‖d‖² − min g_j·d = γ‖d − g_t‖² ≤ 4εM², and the step itself changes the gap by 2εM² at most."""
    epsilon = 3e-2
    weights = MGDA(epsilon, max_iters=5000).weights(gram(rows))
    assert float(weights.min()) >= 0 and float(weights.sum()) == pytest.approx(1, abs=1e-12)
    merged = weights @ rows
    behind = merged @ merged - (rows @ merged).min()
    assert float(behind) <= 6 * epsilon * float(gram(rows).diagonal().max()) + 1e-12


@given(integer_rows(max_tasks=2), st.sampled_from([1e-8, 1.0, 1e8]))
@prop
def test_two_tasks_have_the_closed_form(rows, scale):
    if len(rows) == 1:
        rows = torch.cat([rows, rows.flip(1)])
    a, b = rows
    apart = (a - b) @ (a - b)
    share = float((b @ (b - a) / apart).clamp(0, 1)) if apart > 0 else 0.5
    expected = torch.tensor([share, 1 - share], dtype=torch.float64)
    for make in (MGDA, exact):
        assert difference(rows, make().weights(gram(scale * rows)), expected) <= 1e-12


def test_two_tasks_by_hand():
    """G = diag(1, 4): the point of the segment nearest to zero, (4/5, 1/5)."""
    found = MGDA().weights(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))
    torch.testing.assert_close(found, torch.tensor([0.8, 0.2], dtype=torch.float64))


def test_one_long_gradient_among_short_ones_gets_no_weight():
    """The others point the same way and are shorter: the shortest combination is the shortest of them."""
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [50.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(MGDA().weights(gram(rows)), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


def test_more_iterations_come_closer():
    grams = gram(jacobian("independent", 6, seed=0))
    lengths = [float(w @ grams @ w) for w in (MGDA(1e-9, count).weights(grams) for count in (1, 10, 100, 1000))]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


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
