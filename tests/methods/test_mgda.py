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
        ({"normalization": "L2"}, ["normalization", "L2", "none, l2, loss, loss+"]),
    ],
)
def test_bad_arguments_name_what_was_found(arguments, words):
    with pytest.raises(ValueError) as caught:
        MGDA(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_it_has_no_state_and_says_what_it_is():
    assert MGDA().state_dict() == {}
    assert repr(MGDA()) == "MGDA(epsilon=0.001, max_iters=100, solver='frank-wolfe', normalization='none')"


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
@pytest.mark.parametrize("solver_name", ["frank-wolfe", "exact"])
def test_normalized_it_is_what_it_makes_of_the_normalized_gradients(normalization, solver_name):
    """As the authors' code and LibMTL: these are what is merged, too."""
    oracle = reference.mgda if solver_name == "exact" else reference.frank_wolfe
    method, compared = MGDA(solver=solver_name, normalization=normalization), 0
    for seed in range(60):
        rows = random_rows(seed, 1, 6, ("plain", "common direction", "conflicting", "mixed norms"))
        losses = (10 ** (2 * torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) - 1)).tolist()
        if normalization.startswith("loss"):
            method.losses = losses
        scaled = reference.normalized(rows, normalization, losses)
        expected = oracle(scaled)
        found = method.weights(gram(rows)) @ rows
        assert float((found - expected @ scaled).norm()) <= 1e-9 * float(expected @ scaled.norm(dim=1)), seed
        compared += 1
    assert compared == 60


def test_with_l2_no_scale_of_a_single_gradient_matters():
    method = MGDA(solver="exact", normalization="l2")
    rows = jacobian("conflicting", 4, 0)
    scales = torch.tensor([1e-3, 1.0, 1e5, 7.0], dtype=torch.float64)[:, None]
    merged = method.weights(gram(rows)) @ rows
    torch.testing.assert_close(method.weights(gram(scales * rows)) @ (scales * rows), merged)
    # A zero gradient is the shortest combination, as it is without.
    zeroed = torch.cat([rows, torch.zeros(1, 12, dtype=torch.float64)])
    assert not (method.weights(gram(zeroed)) @ zeroed).any()


def test_the_losses_serve_once_and_those_of_absent_tasks_are_not_asked_for():
    rows = jacobian("conflicting", 3, seed=2)
    method = MGDA(normalization="loss+")
    surgery = contract.Surgery(method, 3)
    method.losses = [torch.tensor(2.0), None, torch.tensor([0.5])]
    surgery.merge({0: rows[0], 2: rows[2]})
    scaled = reference.normalized(rows[[0, 2]], "loss+", [2.0, 0.5])
    torch.testing.assert_close(surgery.parameter.grad, reference.frank_wolfe(scaled) @ scaled)
    with pytest.raises(ValueError, match=r"'loss\+' divides by the losses of tasks \[0, 2\].*set method.losses.*none"):
        surgery.merge({0: rows[0], 2: rows[2]})
    method.losses = [1.0, 1.0]
    with pytest.raises(ValueError, match="found those of 2 tasks"):
        method.weights(gram(rows))


def test_a_loss_that_is_not_finite_gives_nan_and_one_that_is_not_positive_is_refused():
    method = MGDA(normalization="loss")
    for bad in (torch.nan, torch.inf):
        method.losses = torch.tensor([bad, 1.0])
        assert method.weights(torch.eye(2, dtype=torch.float64)).isnan().all()
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"losses must be > 0.*found \[1.0, "):
            method.losses = [1.0, bad]
    with pytest.raises(ValueError, match=r"losses serve normalization.*found 'l2'"):
        MGDA(normalization="l2").losses = [1.0]


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_normalized_what_is_not_finite_stays_in_its_problem(normalization):
    def make():
        method = MGDA(normalization=normalization)
        if normalization != "l2":
            method.losses = [1.0, 2.0, 0.5, 3.0]
        return method

    contract.check_not_finite_stays_in_its_problem(make)
    contract.check_batch_is_a_loop(make)
