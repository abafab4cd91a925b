"""Nash-MTL: G w = 1/w, then the merged gradient shortened to max_norm."""

from functools import partial

import numpy as np
import pytest
import torch

from fastpcgrad.methods.nash_mtl import NashMTL
from tests.methods import contract
from tests.methods.matrices import difference, gram, jacobian, jacobians
from tests.methods.properties import given, integer_rows, prop

SOLVABLE = ("independent", "conflicting", "duplicate")
unshortened = partial(NashMTL, max_norm=0)


def mismatch(grams, weights):
    """max_i |w_i (G w)_i − 1|: each task's gain should be 1."""
    return float((weights * (grams @ weights) - 1).abs().max())


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem:UserWarning")
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
def test_it_is_torchjds_up_to_what_that_leaves_of_the_equation():
    """TorchJD looks at the residual of another equation and stops at 1e-3 of it, or after 20 iterations far from a
    solution. Nowhere is it nearer to the solution than this; and where w_i (G w)_i = 1 + r_i the solution is not far:
    with A = (w_i G_ij w_j), of which the rows add up to 1 + r, its weights are w_i (1 + δ_i) with (A + I) δ = −r to
    first order, so that |δ| ≤ |r|. Left out: a single task, which TorchJD cannot take; two equal gradients, where it
    never gets near; and what has no solution."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    for package in ("cvxpy", "ecos"):
        pytest.importorskip(package)
    compared = 0
    for tasks in (2, 3, 4):
        theirs = torchjd.NashMTL(tasks, max_norm=0.0).weighting
        for name, rows in jacobians(kinds=SOLVABLE, tasks=[tasks], seeds=range(4), scales=(1.0, 10.0, 100.0)):
            if name.startswith("duplicate, T=2"):
                continue
            theirs.prvs_alpha = np.ones(tasks)  # begin anew, without compiling the problem again
            expected = theirs(rows)
            found, left = unshortened().weights(gram(rows)), mismatch(gram(rows), expected)
            assert mismatch(gram(rows), found) <= max(left, 1e-10), name
            if left <= 0.1:
                assert difference(rows, found, expected) <= 2 * left + 1e-9, name
                compared += 1
    assert compared >= 75


@given(integer_rows())
@prop
def test_weights_are_finite_and_positive_whatever_the_gradients(rows):
    """Also at Pareto-stationary points; only a task without gradient gets 0."""
    weights = NashMTL().weights(gram(rows))
    assert bool(weights.isfinite().all())
    assert torch.equal(weights > 0, rows.any(dim=1))


def test_lengths_of_single_task_gradients_do_not_change_the_direction():
    rows = jacobian("conflicting", 4, seed=3)
    lengths = torch.tensor([1e-4, 1.0, 1e2, 1e4], dtype=torch.float64)
    directions = [NashMTL().weights(gram(J)) @ J for J in (rows, lengths[:, None] * rows)]
    torch.testing.assert_close(*(direction / direction.norm() for direction in directions))


def test_two_tasks_by_hand():
    """G = diag(1, 4): w_i² = 1/G_ii."""
    found = unshortened().weights(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize(("max_norm", "length"), [(1.0, 1.0), (0.25, 0.25), (2.0, 3**0.5), (0.0, 3**0.5)])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_merged_gradient_has_one_length_and_direction_at_any_scale(max_norm, length, scale):
    rows = jacobian("conflicting", 3, seed=0)
    merged = NashMTL(max_norm).weights(gram(scale * rows)) @ (scale * rows)
    assert float(merged.norm()) == pytest.approx(length, rel=1e-9)
    expected = unshortened().weights(gram(rows)) @ rows
    torch.testing.assert_close(merged / length, expected / expected.norm())


def test_weights_are_solved_for_in_every_third_call_and_reused_between():
    grams = [gram(jacobian("independent", 3, seed)) for seed in range(6)]
    method = unshortened(update_weights_every=3)
    found = [method.weights(matrix) for matrix in grams]
    for call, weights in enumerate(found):
        torch.testing.assert_close(weights, unshortened().weights(grams[call - call % 3]), rtol=0, atol=0)


def test_reused_weights_are_shortened_and_never_lengthened_for_the_new_gradients():
    rows = jacobian("independent", 3, seed=0)
    method = NashMTL(update_weights_every=3)
    method.weights(gram(rows))
    longer, shorter = 10 * rows, 0.1 * rows
    assert float((method.weights(gram(longer)) @ longer).norm()) == pytest.approx(1.0)
    assert float((method.weights(gram(shorter)) @ shorter).norm()) == pytest.approx(0.1 * 3**0.5)


def test_it_resumes_from_its_state():
    grams = [gram(jacobian("independent", 3, seed)) for seed in range(8)]
    whole, first, second = (NashMTL(update_weights_every=3) for _ in range(3))
    expected = [whole.weights(matrix) for matrix in grams]
    for matrix in grams[:5]:
        first.weights(matrix)
    second.load_state_dict(first.state_dict())
    for matrix, weights in zip(grams[5:], expected[5:], strict=True):
        assert torch.equal(second.weights(matrix), weights)


def test_the_state_is_a_copy():
    method, matrix = NashMTL(update_weights_every=9), gram(jacobian("independent", 3, seed=0))
    expected = method.weights(matrix)
    state, other = method.state_dict(), NashMTL(update_weights_every=9)
    other.load_state_dict(state)
    state["weights"].zero_()
    assert torch.equal(method.weights(matrix), expected)
    assert torch.equal(other.weights(matrix), expected)


def test_reset_starts_over():
    method = NashMTL(update_weights_every=9)
    method.weights(gram(jacobian("independent", 3, seed=0)))
    method.reset()
    other = gram(jacobian("independent", 4, seed=1))
    assert torch.equal(method.weights(other), NashMTL().weights(other))
    assert NashMTL().state_dict() == {"step": 0, "weights": None}


def test_weights_are_not_reused_for_other_tasks():
    method = NashMTL(update_weights_every=2)
    method.weights(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"1 problems of 4 tasks.*1 of 3.*reset"):
        method.weights(torch.eye(4, dtype=torch.float64))
    every = NashMTL()
    assert [len(every.weights(torch.eye(n, dtype=torch.float64))) for n in (3, 4)] == [3, 4]


def test_in_a_surgery_weights_are_reused_for_the_tasks_that_they_belong_to():
    rows = dict(enumerate(jacobian("independent", 4, seed=0)))
    surgery = contract.Surgery(unshortened(update_weights_every=4), 4)

    def merged(*tasks):
        return surgery.merge({t: rows[t] for t in tasks}).weights

    def alone(*tasks):
        return unshortened().weights(gram(torch.stack([rows[t] for t in tasks])))

    first = merged(0, 1, 3)
    torch.testing.assert_close(first, alone(0, 1, 3))
    assert torch.equal(merged(1, 3), first[1:])
    torch.testing.assert_close(merged(1, 2), alone(1, 2))  # task 2 is new
    torch.testing.assert_close(merged(0, 2), alone(0, 2))  # what is known is now of 1 and 2
    torch.testing.assert_close(merged(0, 1), alone(0, 1))  # due


def test_a_batch_whose_problems_break_at_different_times_is_a_loop():
    together, single = NashMTL(update_weights_every=3), [NashMTL(update_weights_every=3) for _ in range(3)]
    for call in range(9):
        grams = torch.stack([gram(jacobian("conflicting", 3, seed=10 * call + s)) for s in range(3)])
        if call in (0, 3, 4):
            grams[call % 3, 0, 0] = torch.inf
        expected = torch.stack([method.weights(matrix) for method, matrix in zip(single, grams, strict=True)])
        torch.testing.assert_close(together.weights(grams), expected, rtol=1e-14, atol=0, equal_nan=True)
        states = torch.cat([method.state_dict()["weights"] for method in single])
        torch.testing.assert_close(together.state_dict()["weights"], states, rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("before", [0, 1])
def test_a_gradient_that_is_not_finite_does_not_enter_the_state(before):
    """As with a GradScaler whose first steps overflow: the weights are found as soon as there are gradients."""
    method, matrix = NashMTL(update_weights_every=5), gram(jacobian("independent", 3, seed=0))
    for _ in range(before):
        method.weights(matrix)
    assert method.weights(torch.full_like(matrix, torch.inf)).isnan().all()
    assert torch.equal(method.weights(matrix), NashMTL().weights(matrix))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"alpha": 1}, ["step", "weights", "alpha"]),
        ({"step": -1, "weights": None}, ["step", "-1"]),
        ({"step": 1, "weights": torch.ones(3)}, ["weights", "float32", "[3]"]),
        ({"step": 1, "weights": [1.0]}, ["weights", "[1.0]"]),
    ],
)
def test_a_bad_state_is_refused(state, words):
    with pytest.raises(ValueError) as caught:
        NashMTL().load_state_dict(state)
    assert all(word in str(caught.value) for word in words)


def test_a_batch_is_a_loop():
    contract.check_batch_is_a_loop(NashMTL)


def test_not_finite():
    contract.check_not_finite_stays_in_its_problem(NashMTL)


def test_bad_grams_are_refused():
    contract.check_bad_grams_are_refused(NashMTL)


def test_in_a_surgery():
    contract.check_surgery(NashMTL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_norm": -1.0}, ["max_norm", "-1.0"]),
        ({"update_weights_every": 0}, ["update_weights_every", "0"]),
        ({"optim_niter": 0}, ["optim_niter", "0"]),
    ],
)
def test_bad_arguments_name_what_was_found(arguments, words):
    with pytest.raises(ValueError) as caught:
        NashMTL(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_repr_says_what_was_chosen():
    assert repr(NashMTL()) == "NashMTL(max_norm=1.0, update_weights_every=1, optim_niter=100)"
