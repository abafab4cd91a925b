"""IMTL-G: equal projections onto all unit task gradients."""

import pytest
import torch

from fastpcgrad.methods.imtlg import IMTLG
from tests.methods import contract
from tests.methods.matrices import difference, gram, jacobians


def test_it_is_torchjds():
    theirs = pytest.importorskip("torchjd.aggregation").IMTLGWeighting()
    compared = 0
    for name, rows in jacobians():
        kind = name.split(",")[0]
        if kind in ("opposite", "dependent") and torch.linalg.matrix_rank(rows) < len(rows):
            continue  # Σv is a sum that cancels, and the rounding of G decides it
        expected = theirs(gram(rows))
        assert difference(rows, IMTLG().weights(gram(rows)), expected) <= 1e-9, name
        compared += 1
    assert compared >= 200


def test_two_tasks_by_hand():
    """G = [[1, 0], [0, 4]]: v = G⁻¹(1, 2) = (1, ½)."""
    found = IMTLG().weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_opposite_gradients_have_no_common_direction(scale):
    opposite = scale**2 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert not IMTLG().weights(opposite).any()
    assert not IMTLG().weights(torch.zeros(3, 3, dtype=torch.float64)).any()


def test_a_batch_is_a_loop():
    contract.check_batch_is_a_loop(IMTLG)


def test_not_finite():
    contract.check_not_finite_stays_in_its_problem(IMTLG)


def test_scaled_gradients_give_the_same_weights():
    contract.check_scaled_gradients_give_the_same_weights(IMTLG)


def test_bad_grams_are_refused():
    contract.check_bad_grams_are_refused(IMTLG)


def test_in_a_surgery():
    contract.check_surgery(IMTLG)


def test_it_has_no_state_and_says_what_it_is():
    assert IMTLG().state_dict() == {} and repr(IMTLG()) == "IMTLG()"
