"""UPGrad: hand-worked cases and what it alone does; ``test_dual_cone`` has what it shares with DualProj."""

import torch

from fastpcgrad.methods.upgrad import UPGrad
from tests.methods.random_rows import gram, random_rows


def test_the_regularisation_bounds_what_conflict_is_left():
    """G'v ≥ 0 with G' = G / tr G + ε I leaves J (vJ) ≥ −ε v tr G."""
    for seed in range(50):
        rows = random_rows(seed)
        weights = UPGrad(reg_eps=1e-2).weights(gram(rows))
        left = 1e-2 * weights * gram(rows).trace()
        assert ((rows @ (weights @ rows)) >= -left * (1 + 1e-9)).all()


def test_without_conflict_it_is_the_mean():
    gram = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(UPGrad().weights(gram), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_two_opposites_and_a_third_by_hand():
    """(1, 0) and (-1, 0) project to zero, (1, 1) to (0, 1)."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    merged = UPGrad([1.0, 1.0, 1.0], reg_eps=0.0).weights(gram(rows)) @ rows
    torch.testing.assert_close(merged, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_repr():
    assert repr(UPGrad([1, 2])) == "UPGrad(pref_vector=[1.0, 2.0], norm_eps=0.0, reg_eps=0.0001)"
