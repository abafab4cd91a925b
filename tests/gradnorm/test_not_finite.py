"""gradNorm on batches that are not finite: skipped, shown in the log, told."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fastpcgrad import FastPCGradWarning
from fastpcgrad.gradnorm import gradNorm

from .toy import ToyNet, for_each_variant, toy


def poisoned(batch, bad, where):
    """The loss of the first task is not finite, or its norm alone."""
    x, y = (values.clone() for values in batch)
    if where == "loss":
        y[0, 0, 0] = bad
    else:
        x[0, 0] = BENT
    return x, y


BENT = 0.123456789


"""Marks a batch whose gradients are to be NaN, its losses not."""


class BentNet(ToyNet):
    def forward(self, x, y):
        losses = super().forward(x, y)
        if x[0, 0] == BENT:
            losses.register_hook(lambda grad: grad * torch.nan)
            losses = losses * 1
        return losses


@for_each_variant
@pytest.mark.parametrize("where", ["loss", "norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("places", [(0,), (1,), (0, 0, 3), (2, 3)])
def test_a_batch_that_is_not_finite_is_skipped_shows_in_the_log_and_is_told(looks, variant, where, bad, places):
    net, data = toy(3, 4)
    bent = BentNet(3).double()
    bent.load_state_dict(net.state_dict())
    fed, bad_rows = [], []
    for index, batch in enumerate(data):
        for _ in range(places.count(index)):
            bad_rows.append(len(fed))
            fed.append(poisoned(batch, bad, where))
        fed.append(batch)
    expected = gradNorm(net, net.last, 0.12, data, 1, 1e-3, 1e-2, log=True, variant=variant)
    with pytest.warns(FastPCGradWarning, match=f"skipped {len(places)} of {len(fed)} batches"):
        found = gradNorm(bent, bent.last, 0.12, fed, 1, 1e-3, 1e-2, log=True, variant=variant)
    for logged, alone in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.delete(logged, bad_rows, axis=0), alone)
    assert np.isfinite(found[0]).all()
    assert np.isfinite(found[1][bad_rows]).all() == (where == "norm" and places[0] > 0), "L(0) may not be known yet"
    for parameter, other in zip(bent.parameters(), net.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("log", [True, False])
def test_a_run_of_bad_batches_alone_leaves_the_network(looks, log):
    net, data = toy(2, 3)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    data = [poisoned(batch, float("nan"), "loss") for batch in data]
    with pytest.warns(FastPCGradWarning, match="skipped 6 of 6"):
        log_weights, log_loss = gradNorm(net, net.last, 0.12, data, 2, 1e-3, 1e-3, log=log)
    assert (log_weights == 1).all() and np.isnan(log_loss).all() and len(log_loss) == 6 * log
    assert all(torch.equal(parameter, old) for parameter, old in zip(net.parameters(), before, strict=True))


def test_a_network_with_complex_parameters_skips_too(looks):
    """No fused optimizer takes them."""

    class ComplexNet(ToyNet):
        def __init__(self, tasks):
            super().__init__(tasks)
            self.phase = nn.Parameter(torch.ones(tasks, dtype=torch.complex128))

        def forward(self, x, y):
            return super().forward(x, y) * self.phase.abs()

    _, data = toy(2, 3)
    data = [poisoned(data[0], float("nan"), "loss"), *data]
    net = ComplexNet(2).double()
    alone = copy.deepcopy(net)
    with pytest.warns(FastPCGradWarning, match="skipped 1 of 4"):
        gradNorm(net, net.last, 0.12, data, 1, 1e-3, 1e-3)
    gradNorm(alone, alone.last, 0.12, data[1:], 1, 1e-3, 1e-3)
    for parameter, other in zip(net.parameters(), alone.parameters(), strict=True):
        assert torch.equal(parameter, other)
