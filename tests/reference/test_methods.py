"""The oracles of the methods: arithmetic by hand, and what each paper says of the answer."""

import math

import pytest
import torch

from fastpcgrad import reference
from tests.methods.random_rows import random_rows

ROOT = math.sqrt(5)


def J(*rows):
    return torch.tensor(rows, dtype=torch.float64)


BY_HAND = [
    # The point of the segment from (1, 0) to (-1, 1) nearest to zero is (1/5, 2/5).
    (reference.mgda, [[1, 0], [-1, 1]], [3 / 5, 2 / 5]),
    (reference.mgda, [[3, 0], [1, 0], [2, 5]], [0, 1, 0]),
    (reference.mgda, [[1, 0], [-2, 0], [5, 5]], [2 / 3, 1 / 3, 0]),
    # From (1/2, 1/2) the first corner has the smaller product, 1/2 < 2; γ = (5/4 - 1/2)/(5/4 + 1 - 1) = 3/5.
    (lambda rows: reference.frank_wolfe(rows, max_iters=1), [[1, 0], [0, 2]], [4 / 5, 1 / 5]),
    # The worst gain is that of the first task: d - g_0 goes along it, half of |g_0| = √5/2 far.
    (lambda rows: reference.cagrad(rows, 0.5), [[1, 0], [0, 2]], [1 / 2 + ROOT / 4, 1 / 2]),
    (lambda rows: reference.cagrad(rows, 0.0), [[1, 0], [0, 2]], [1 / 2, 1 / 2]),
    (lambda rows: reference.cagrad(rows, 0.9), [[1, 0], [-1, 0], [1, 1]], [0, 0, 0]),
    # (1, 0) goes to (1/2, 1/2), (-1, 1) to (0, 1).
    (reference.upgrad, [[1, 0], [-1, 1]], [1, 3 / 4]),
    # G/5 + ½ I = [[7, -2], [-2, 13]]/10: for u = e_1 v_2 = 2/13; for u = e_2 v_1 = 2/7.
    (lambda rows: reference.upgrad(rows, [1, 1], reg_eps=0.5), [[1, 0], [-1, math.sqrt(3)]], [9 / 7, 15 / 13]),
    (lambda rows: reference.upgrad(rows, norm_eps=4.0), [[1, 0], [-1, 1]], [1 / 2, 1 / 2]),
    # The mean (-1, ½) goes to (0, ½).
    (reference.dualproj, [[1, 0], [-3, 1]], [3 / 2, 1 / 2]),
    (lambda rows: reference.dualproj(rows, [1, 0]), [[0, 0], [0, 0]], [1, 0]),
    # 4 x = x^(-1/α) gives 4^(-α/(1 + α)).
    (lambda rows: reference.fairgrad(rows, 1.0), [[1, 0], [0, 2]], [1, 1 / 2]),
    (lambda rows: reference.fairgrad(rows, 3.0), [[1, 0], [0, 2], [0, 0]], [1, 4**-0.75, 0]),
    (lambda rows: reference.fairgrad(rows, 0.0), [[1, 0], [0, 2]], [1 / 2, 1 / 2]),
    # w J = (1, 1) is √2 long.
    (lambda rows: reference.nash_mtl(rows, 0.0), [[1, 0], [0, 2]], [1, 1 / 2]),
    (lambda rows: reference.nash_mtl(rows, 1.0), [[1, 0], [0, 2]], [2**-0.5, 2**-1.5]),
    (lambda rows: reference.nash_mtl(rows, 5.0, J(3, 2)), [[1, 0], [0, 2]], [3, 2]),
    # v = G⁻¹ (1, 2) = (1, ½).
    (reference.imtlg, [[1, 0], [0, 2]], [2 / 3, 1 / 3]),
    (reference.imtlg, [[1, 0], [-1, 0]], [0, 0]),
    # The direction (1, 1)/√2 with length 4/√2.
    (reference.conflict_free, [[3, 0], [0, 1]], [2 / 3, 2]),
    (reference.conflict_free, [[1, 0], [-2, 0]], [0, 0]),
    # (2, 1) is the direction, (6 + 1)/√5 the length.
    (lambda rows: reference.conflict_free(rows, [2, 1]), [[3, 0], [0, 1]], [14 / 15, 7 / 5]),
    # Singular values 2 and 1; σ = 1, 1 (the lower of two) and √2.5.
    (reference.aligned_mtl, [[1, 0], [0, 2]], [1 / 2, 1 / 4]),
    (lambda rows: reference.aligned_mtl(rows, None, "median"), [[1, 0], [0, 2]], [1 / 2, 1 / 4]),
    (lambda rows: reference.aligned_mtl(rows, [2, 2], "rmse"), [[1, 0], [0, 2]], [2 * 2.5**0.5, 2.5**0.5]),
    (reference.aligned_mtl, [[0, 0], [0, 0]], [1 / 2, 1 / 2]),
    # On a line each has one nearest, 1, 1, 2 and 7 away; of the equal the first.
    (lambda rows: reference.krum(rows, 1), [[0], [1], [3], [10]], [1, 0, 0, 0]),
    (lambda rows: reference.krum(rows, 1, 2), [[0], [1], [3], [10]], [1 / 2, 1 / 2, 0, 0]),
    # The four nearest are 9 away from 2 and 10 from 3; with squares 31 and 30.
    (lambda rows: reference.krum(rows, 0, squared=False), [[0], [1], [2], [3], [7], [8]], [0, 0, 1, 0, 0, 0]),
    (lambda rows: reference.krum(rows, 0), [[0], [1], [2], [3], [7], [8]], [0, 0, 0, 1, 0, 0]),
    # (1, -1) against the mean of (0, 3) and (0, 1): half of (0, 2).
    (reference.agem, [[1, -1], [0, 3], [0, 1]], [1, 1 / 4, 1 / 4]),
    (reference.agem, [[1, 1], [0, 3], [0, 1]], [1, 0, 0]),
    (reference.agem, [[1, 1], [0, 3], [0, -3]], [1, 0, 0]),
    (reference.agem, [[5, 1]], [1]),
    # (1, 0) and (-3, 4)/5: of the second 3/5 is lacking, to be added 3/5 times; (16, 12)/25 is 4/5 long.
    (lambda rows: reference.pcd(rows, [1, 25], [0]), [[1, 0], [-3, 4]], [5 / 4, 3 / 20]),
    (lambda rows: reference.pcd(rows, [4, 4], [0]), [[2, 0], [0, 2]], [1, 0]),
    (lambda rows: reference.pcd(rows, [1, 1, 1], [0.5, 0.5]), [[1, 0], [0, 1], [0, -1]], [1, 0, 0]),
    (lambda rows: reference.pcd(rows, [1, 1], [0]), [[1, 0], [-1, 0]], [0, 0]),
    (reference.mean, [[1], [2]], [1 / 2, 1 / 2]),
    (reference.total, [[1], [2]], [1, 1]),
    (lambda rows: reference.constant([3, -1]), [[1], [2]], [3, -1]),
    (lambda rows: reference.random_weights(J(0, math.log(3))), [[1], [2]], [1 / 4, 3 / 4]),
    # The columns' purities are 3/4, 1/4, 1 and 0 (for zeros): what of it lies above U keeps the positive.
    (
        lambda rows: reference.graddrop(rows, J(0.7, 0.3, 0.9, 0.0)),
        [[3, 1, 2, 0], [-1, -3, 1, 0]],
        [3, -3, 3, 0],
    ),
    (
        lambda rows: reference.graddrop(rows, J(0.9, 0.9), [0.0, 0.5], lambda purity: 0 * purity + 1),
        [[3, 1], [-1, -3]],
        [2.5, -0.5],
    ),
    (lambda rows: reference.trimmed_mean(rows, 1), [[1, 4], [2, 4], [3, -9], [10, 4]], [2.5, 4]),
]


@pytest.mark.parametrize(("oracle", "rows", "expected"), BY_HAND)
def test_by_hand(oracle, rows, expected):
    torch.testing.assert_close(oracle(J(*rows)), J(*expected), rtol=1e-14, atol=1e-14)


def test_two_opposites_and_a_third_project_to_what_is_across():
    """(1, 0) and (-1, 0) project to zero, (1, 1) to (0, 1), by more than one vector of weights."""
    rows = J([1, 0], [-1, 0], [1, 1])
    torch.testing.assert_close(reference.upgrad(rows, [1, 1, 1]) @ rows, J(0, 1))


def test_gradvac_by_hand():
    """cos = −0.6 with targets 0 and ½: the factors are 0.6, and (½·0.8 + 0.6·√¾)/√¾; the targets go half the way."""
    rows, targets = J([1, 0], [-0.6, 0.8]), J([0, 0], [0.5, 0])
    turned, after = reference.gradvac(rows, [[1], [0]], targets)
    torch.testing.assert_close(turned, J([1 - 0.36, 0.48], [0.4 / 0.75**0.5, 0.8]))
    torch.testing.assert_close(after, J([0, -0.3], [-0.05, 0]))
    assert targets.tolist() == [[0, 0], [0.5, 0]]


def independent(least=1):
    """Task gradients far from depending on each other."""
    found = []
    for seed in range(24):
        rows = random_rows(seed, least, 5, ("plain", "common direction", "mixed norms"))
        if torch.linalg.svdvals(torch.nn.functional.normalize(rows, eps=0)).min() > 1e-2:
            found.append(rows)
    assert len(found) >= 16
    return found


def test_no_task_gradient_lies_behind_the_shortest_combination():
    for rows in independent():
        weights = reference.mgda(rows)
        d = weights @ rows
        assert weights.min() >= 0 and float(weights.sum()) == pytest.approx(1, rel=1e-12)
        assert float(d @ d - (rows @ d).min()) <= 1e-12 * float(d @ d)


@pytest.mark.parametrize("c", [0.2, 0.9, 2.0])
def test_no_direction_in_the_ball_gains_more_for_all_tasks(c):
    """The primal and the dual problem of the paper have one value."""
    for rows in independent():
        mean, added = rows.mean(dim=0), reference.cagrad(rows, c, norm_eps=0.0) - 1 / len(rows)
        v = added / added.sum() @ rows
        assert (added >= 0).all()
        assert float((added @ rows).norm()) <= c * float(mean.norm()) * (1 + 1e-12)
        bound = v @ mean + c * mean.norm() * v.norm()
        assert float(bound - (rows @ (mean + added @ rows)).min()) <= 1e-12 * float(mean.norm() * rows.norm())


@pytest.mark.parametrize("oracle", [reference.upgrad, reference.dualproj])
def test_projections_conflict_with_no_task(oracle):
    for rows in independent():
        p = oracle(rows) @ rows
        assert float((rows @ p / rows.norm(dim=1)).min()) >= -1e-12 * float(p.norm())


def test_the_projection_of_the_mean_is_the_nearest():
    """p − m is a combination of task gradients with weights that are not negative, and at right angles to p."""
    for rows in independent():
        m, weights = rows.mean(dim=0), reference.dualproj(rows)
        assert (weights >= 1 / len(rows)).all()
        assert abs(float((m - weights @ rows) @ (weights @ rows))) <= 1e-12 * float(m @ m)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_each_task_has_its_share(alpha):
    for rows in independent():
        weights = reference.fairgrad(rows, alpha)
        torch.testing.assert_close(rows @ (weights @ rows), weights ** (-1 / alpha), rtol=1e-9, atol=0)


def test_where_gradients_cancel_no_weights_are_fair():
    for rows in (J([1, 0], [-2, 0]), J([1, 0], [-1, 1], [0, -2])):
        with pytest.raises(ArithmeticError, match="grow without bound"):
            reference.fairgrad(rows, 1.0)


def test_projections_onto_unit_gradients_are_equal():
    for rows in independent():
        weights = reference.imtlg(rows)
        projections = rows @ (weights @ rows) / rows.norm(dim=1)
        assert float(weights.sum()) == pytest.approx(1, rel=1e-12)
        torch.testing.assert_close(projections, projections.mean().expand(len(rows)), rtol=1e-8, atol=0)


def test_cosines_are_as_preferred_and_the_length_is_the_sum_of_projections():
    for rows in independent():
        wanted = [1.0, 3.0, 2.0, 0.5, 1.0][: len(rows)]
        d = reference.conflict_free(rows, wanted) @ rows
        cosines = rows @ d / rows.norm(dim=1) / d.norm()
        torch.testing.assert_close(cosines / cosines[0], J(*wanted), rtol=1e-10, atol=0)
        torch.testing.assert_close(rows.sum(dim=0) @ d / d.norm(), d.norm(), rtol=1e-10, atol=0)


def test_aligned_gradients_are_orthogonal_and_as_long_as_the_smallest_singular_value():
    for rows in independent():
        aligned = torch.stack([reference.aligned_mtl(rows, unit.tolist()) @ rows for unit in torch.eye(len(rows))])
        products = aligned @ aligned.mT / torch.linalg.svdvals(rows).min() ** 2
        torch.testing.assert_close(products, torch.eye(len(rows)).double(), rtol=0, atol=1e-9)


def test_a_turned_gradient_has_the_target_cosine():
    for rows in independent(least=2):
        turned, _ = reference.gradvac(rows[:2], [[1], [0]], torch.full((2, 2), 0.4, dtype=torch.float64))
        before = float(torch.cosine_similarity(rows[0], rows[1], dim=0))
        for row, other in zip(turned, rows[[1, 0]], strict=True):
            assert float(torch.cosine_similarity(row, other, dim=0)) == pytest.approx(max(before, 0.4), rel=1e-12)
