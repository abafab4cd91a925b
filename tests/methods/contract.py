"""What every Gram-based method must do, as checks that take a function that makes the method."""

import pytest
import torch

import fastpcgrad
from tests.methods.matrices import KINDS, difference, gram, jacobian


def check_batch_is_a_loop(make, tolerance=1e-12):
    """S problems at once give what one after the other do, with one problem of each kind of Jacobian."""
    rows = [jacobian(kind, 4, seed=11) for kind in KINDS]
    grams = torch.stack([gram(matrix) for matrix in rows])
    together = make().solve(grams)
    assert together.weights.shape == (len(rows), 4) and together.weights.dtype == torch.float64
    for s, matrix in enumerate(rows):
        alone = make().solve(grams[s])
        assert alone.weights.shape == (4,)
        assert difference(matrix, together.weights[s], alone.weights) <= tolerance
        if alone.coefficients is not None:
            torch.testing.assert_close(together.coefficients[s], alone.coefficients)


def check_not_finite_stays_in_its_problem(make):
    healthy = gram(jacobian("conflicting", 4, seed=5))
    expected = make().weights(torch.stack([healthy, healthy, healthy]))
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = healthy.clone()
        broken[1, 2] = bad
        assert make().weights(broken).isnan().all()
        weights = make().weights(torch.stack([broken, healthy, broken]))
        assert weights[0].isnan().all() and weights[2].isnan().all()
        torch.testing.assert_close(weights[1], expected[1], rtol=1e-12, atol=0)


def check_scaled_gradients_give_the_same_weights(make, tolerance=1e-9):
    for kind in ("independent", "conflicting", "duplicate"):
        rows = jacobian(kind, 4, seed=2)
        weights = make().weights(gram(rows))
        for scale in (1e-8, 1e8):
            assert difference(rows, make().weights(gram(scale * rows)), weights) <= tolerance


def check_bad_grams_are_refused(make):
    for bad in (torch.eye(2), torch.ones(2, 3).double(), torch.ones(2).double(), torch.ones(1, 1, 2, 2).double()):
        with pytest.raises(ValueError, match="gram"):
            make().solve(bad)


class Surgery:
    """Rounds of GradientSurgery on one parameter, in which tasks may be absent."""

    def __init__(self, method, num_tasks):
        self.parameter = torch.nn.Parameter(torch.zeros(12, dtype=torch.float64))
        self._surgery = fastpcgrad.GradientSurgery([self.parameter], num_tasks, method=method)

    def merge(self, rows):
        """rows: task index → its gradient."""
        for t, row in rows.items():
            with self._surgery.task(t):
                (self.parameter @ row).backward()
        return self._surgery.merge()


def check_surgery(make):
    """The method in GradientSurgery: .grad is w J."""
    rows = jacobian("conflicting", 3, seed=1)
    surgery = Surgery(make(), 3)
    report = surgery.merge(dict(enumerate(rows)))
    weights = make().weights(gram(rows))
    torch.testing.assert_close(report.weights, weights)
    torch.testing.assert_close(surgery.parameter.grad, weights @ rows)
