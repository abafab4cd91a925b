"""Surgery with factors on random graphs: what plain backward passes in float64 give, and nothing else touched."""

import os
import random

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.rows import stacked

from .random_graphs import Drawn

GRAPHS = int(os.environ.get("FASTPCGRAD_TEST_GRAPHS", 50))
"""By hand more."""


def drawn(seed, tasks, kinds=None):
    """Not a copy: hooks do not go along with one."""
    torch.manual_seed(seed)
    return Drawn(random.Random(seed), tasks, kinds).double()


def plain_rows(model, x):
    """J of the parameters of the surgery, by one backward pass a task; ``.grad`` of all others adds up as ever."""
    parameters = model.of_surgery()
    losses = model(x)
    rows = []
    for n, loss in enumerate(losses):
        for p in parameters:
            p.grad = None
        loss.backward(retain_graph=n + 1 < len(losses))
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
    return torch.stack(rows)


def flat(model):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.of_surgery()])


def check(model, twin, x, tasks, tolerance=1e-12):
    """Four steps with factors against plain backward passes of a twin; gives the reports."""
    y = x.detach().clone().requires_grad_(x.requires_grad)
    surgery = fastpcgrad.GradientSurgery(model.of_surgery(), tasks, methods.PCGrad("tensorflow"), rows="factored")
    reports = []
    for _ in range(4):
        J = plain_rows(twin, y)
        G = J.double() @ J.double().T
        w = methods.PCGrad("tensorflow").weights(G)
        report = surgery.backward(model(x))
        scale = (w.abs() * G.diagonal().sqrt()).sum()
        lengths = G.diagonal().sqrt()
        assert ((report.gram - G).abs() <= tolerance * lengths[:, None] * lengths).all()
        assert torch.linalg.vector_norm(flat(model).double() - w @ J.double()) <= tolerance * scale
        for own, other in ((model.outside, twin.outside), (x, y)):
            assert (own.grad is None) == (other.grad is None)
            if own.grad is not None:
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)
        reports.append(report)
    return reports


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_a_random_graph(seed, monkeypatch):
    draw = random.Random(seed)
    tasks, learned_input = draw.randint(2, 4), draw.random() < 0.2
    model, twin = (drawn(seed, tasks) for _ in range(2))
    monkeypatch.setattr(stacked, "stacking_pays", lambda *_: True)
    check(model, twin, torch.randn(model.shape, dtype=torch.float64, requires_grad=learned_input), tasks)
