"""A-GEM: the formula, and what it shares with the projection onto the dual cone."""

import pytest
import torch

from fastpcgrad import methods
from fastpcgrad.methods import AGEM
from tests.methods import contract
from tests.methods.properties import given, integer_rows, prop
from tests.methods.random_rows import check_batch, check_broken, check_scales, error, gram, random_rows


def test_it_is_the_published_rule():
    """As the authors' code: g − ((g·r) / (r·r)) r, where g·r < 0."""
    projected = 0
    for seed in range(240):
        g, r = random_rows(seed, 2, 2, ("plain", "conflicting", "mixed norms", "common direction"))
        dot = g @ r
        expected = g - dot / (r @ r) * r if dot < 0 else g
        rows = torch.stack([g, r])
        weights = AGEM().weights(gram(rows))
        assert error(weights @ rows, expected, weights, rows) <= 1e-12
        projected += bool(dot < 0)
    assert 60 <= projected <= 230


def test_with_two_tasks_it_is_the_projection_onto_the_dual_cone():
    for seed in range(60):
        rows = random_rows(seed, 2, 2)
        found, cone = (m.weights(gram(rows)) for m in (AGEM(), methods.DualProj([1, 0], reg_eps=0.0)))
        assert error(found @ rows, cone @ rows, found, rows) <= 1e-9, seed


@prop
@given(rows=integer_rows())
def test_it_never_conflicts_with_the_memory_and_goes_no_further_than_needed(rows):
    weights = AGEM().weights(gram(rows))
    merged, memory = weights @ rows, rows[1:].sum(dim=0)
    assert float(merged @ memory) >= -1e-9
    assert weights[0] == 1 and (weights >= 0).all() and len(set(weights[1:].tolist())) <= 1
    assert (rows[0] @ memory < 0) or torch.equal(merged, rows[0])
    order = [0, *reversed(range(1, len(rows)))]
    torch.testing.assert_close(AGEM().weights(gram(rows[order])), weights[order])


def test_a_memory_of_rounding_alone_is_none():
    """(0.1 + 0.2) − 0.3 is not zero in floating point."""
    rows = torch.tensor([[-1.0, 0.0], [0.1, 0.0], [0.2, 0.0], [-0.3, 0.0]], dtype=torch.float64)
    assert AGEM().weights(gram(rows)).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_without_a_memory_it_is_the_gradient():
    surgery = contract.Surgery(AGEM(), 3)
    rows = torch.randn(3, 12, dtype=torch.float64)
    assert surgery.merge({0: rows[0]}).weights.tolist() == [1.0]
    assert surgery.merge({0: rows[0], 2: -rows[0]}).weights.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"AGEM has task 0 as its current task, which is absent; found tasks \[1, 2\]"):
        surgery.merge({1: rows[1], 2: rows[2]})


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_problems_are_alone(tasks):
    check_batch(AGEM(), tasks)
    check_broken(AGEM(), tasks)


def test_scales():
    check_scales(AGEM(), 5)


def test_it_has_no_state_and_says_what_it_is():
    assert AGEM().state_dict() == {} and repr(AGEM()) == "AGEM()"
