"""DualProj: hand-worked cases and what it alone does; ``test_dual_cone`` has what it shares with UPGrad."""

import torch

from fastpcgrad.methods.dualproj import DualProj
from tests.methods.random_rows import gram


def test_by_hand():
    """The mean of (1, 0) and (-3, 1) is (-1, ½), which conflicts with the first: it goes to (0, ½)."""
    rows = torch.tensor([[1.0, 0.0], [-3.0, 1.0]], dtype=torch.float64)
    weights = DualProj(reg_eps=0.0).weights(gram(rows))
    torch.testing.assert_close(weights, torch.tensor([1.5, 0.5], dtype=torch.float64))


def test_repr():
    assert repr(DualProj()) == "DualProj(pref_vector=None, norm_eps=0.0, reg_eps=0.0001)"
