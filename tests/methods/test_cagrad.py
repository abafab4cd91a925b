"""CAGrad: the best direction for the worst-off task within a ball around the mean gradient."""

from functools import partial

import pytest
import torch

from fastpcgrad.methods.cagrad import CAGrad
from tests.methods import contract
from tests.methods.matrices import difference, gram, jacobian, jacobians
from tests.methods.random_rows import random_rows

make = partial(CAGrad, c=0.5)


def worst_gain(rows, weights):
    """min_i g_i·d in units of ‖g_0‖‖J‖_F: what CAGrad maximises."""
    return float((rows @ (weights @ rows)).min() / (rows.mean(dim=0).norm() * rows.norm()))


def dual(rows, v, c):
    """g_v·g_0 + c‖g_0‖‖g_v‖ in the same units: no direction in the ball gains more for all tasks."""
    mean = rows.mean(dim=0)
    mixed = v @ rows
    return (mixed @ mean / mean.norm() + c * mixed.norm(dim=-1)) / rows.norm()


@pytest.mark.parametrize("c", [0.2, 0.5, 1.5])
def test_it_is_torchjds(c):
    """TorchJD's solver finds the smallest value to about 1e-8, and so its weights to about the root of that."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    for package in ("cvxpy", "clarabel"):
        pytest.importorskip(package)
    theirs = torchjd.CAGradWeighting(c)
    compared = 0
    # No small scale: TorchJD gives zeros where ‖J‖_F² < 1e-4.
    for name, rows in jacobians(tasks=(1, 2, 3, 4, 6, 8), scales=(1.0, 1e8)):
        expected, found = theirs(gram(rows)), CAGrad(c).weights(gram(rows))
        assert bool(expected.any()) == bool(found.any()), name
        assert difference(rows, found, expected) <= 1e-3, name
        if found.any():
            assert worst_gain(rows, found) >= worst_gain(rows, expected) - 1e-8, name
        compared += 1
    assert compared >= 200


def as_published(rows, c, rescale):
    """The rule of Cranial-XIX/CAGrad (commit c691dc5), cityscapes/utils.py, for two tasks, without 1e-8 in roots."""
    minimize_scalar = pytest.importorskip("scipy.optimize").minimize_scalar
    (g11, g12), (_, g22) = gram(rows).tolist()
    radius = c * 0.5 * (g11 + g22 + 2 * g12) ** 0.5

    def squared(x):
        return x * x * (g11 + g22 - 2 * g12) + 2 * x * (g12 - g22) + g22

    def objective(x):
        along = 0.5 * x * (g11 + g22 - 2 * g12) + (0.5 + x) * (g12 - g22) + g22
        return radius * max(squared(x), 0.0) ** 0.5 + along

    x = minimize_scalar(objective, bounds=(0, 1), method="bounded", options={"xatol": 1e-12}).x
    share = radius / squared(x) ** 0.5
    return torch.tensor([0.5 + share * x, 0.5 + share * (1 - x)], dtype=torch.float64) / rescale


@pytest.mark.parametrize("c", [0.2, 0.5])
def test_variants_are_what_was_published(c):
    for seed in range(200):
        torch.manual_seed(seed)
        rows = torch.randn(2, 5, dtype=torch.float64)
        for variant, divisor in {"paper": 1, "cagrad": 1 + c**2, "cagrad-toy": 1 + c}.items():
            found = CAGrad(c, variant=variant).weights(gram(rows))
            # The minimum of a function is known to the root of its rounding.
            assert difference(rows, found, as_published(rows, c, divisor)) <= 1e-6, (seed, variant)


@pytest.mark.parametrize("tasks", [32, 64])
@pytest.mark.parametrize("c", [0.5, 2.0])
def test_the_worst_gain_of_many_tasks_is_the_best_possible(c, tasks, solver):
    """d lies in the ball and gains what the dual problem allows at most."""
    rows = random_rows(tasks, tasks, tasks, ("conflicting",))
    weights, mean = CAGrad(c).weights(gram(rows)), rows.mean(dim=0)
    added = weights - 1 / tasks
    assert float((weights @ rows - mean).norm()) <= c * float(mean.norm()) * (1 + 1e-12)
    assert abs(float(dual(rows, added / added.sum(), c)) - worst_gain(rows, weights)) <= 1e-12


def test_two_tasks_by_hand():
    """G = diag(1, 4), c = ½: ‖g_0‖ = √5/2, and v = (1, 0) as its slope ¼ + √5/4 lies below that of g_2 throughout.
    So w = (½ + √5/4, ½)."""
    found = make().weights(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))
    torch.testing.assert_close(found, torch.tensor([0.5 + 5**0.5 / 4, 0.5], dtype=torch.float64))


def test_no_radius_gives_the_mean():
    grams = gram(jacobian("conflicting", 4, seed=0))
    torch.testing.assert_close(CAGrad(0.0).weights(grams), torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_a_pareto_stationary_point_gives_zeros(scale):
    """The first two rows nearly cancel, and no other combination has a negative value."""
    rows = scale * torch.tensor([[1.0, 0.0], [-1.0, 1e-6], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert not CAGrad(0.9).weights(gram(rows)).any()
    assert CAGrad(0.9, norm_eps=1e-8).weights(gram(rows)).any()
    assert not make().weights(torch.zeros(2, 2, dtype=torch.float64)).any()


def test_a_batch_is_a_loop():
    contract.check_batch_is_a_loop(make)


def test_not_finite():
    contract.check_not_finite_stays_in_its_problem(make)


def test_scaled_gradients_give_the_same_weights():
    contract.check_scaled_gradients_give_the_same_weights(make)


def test_bad_grams_are_refused():
    contract.check_bad_grams_are_refused(make)


def test_in_a_surgery():
    contract.check_surgery(make)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"c": -0.1}, ["c must", "-0.1"]),
        ({"c": float("inf")}, ["c must", "inf"]),
        ({"c": 0.5, "norm_eps": -1.0}, ["norm_eps", "-1.0"]),
        ({"c": 0.5, "norm_eps": float("nan")}, ["norm_eps", "nan"]),
        ({"c": 0.5, "variant": "libmtl"}, ["variant", "libmtl", "cagrad-toy"]),
    ],
)
def test_bad_arguments_name_what_was_found(arguments, words):
    with pytest.raises(ValueError) as caught:
        CAGrad(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_it_has_no_state_and_says_what_it_is():
    assert CAGrad().c == 0.5
    assert make().state_dict() == {} and repr(make()) == "CAGrad(c=0.5, norm_eps=0.0001, variant='paper')"
