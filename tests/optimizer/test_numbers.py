"""PCGrad(optimizer) with mixed precision and clipping, and at numbers that are not finite."""

import copy

import pytest
import torch
from torch import nn

import fastpcgrad

from .models import fixed, losses_of, values


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain Adam", "fused Adam"])
@pytest.mark.parametrize("unscale", [True, False], ids=["unscale and clip", "no unscale"])
def test_loss_scaling_changes_nothing(model, x, options, unscale):
    def run(model, scaler):
        optimizer = fixed(torch.optim.Adam(model.parameters(), lr=0.05, **options))
        for _ in range(4):
            optimizer.zero_grad()
            optimizer.pc_backward([scaler.scale(loss) for loss in losses_of(model, x)])
            if unscale:
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                assert norm > 0.1 and norm.isfinite()
            scaler.step(optimizer)
            scaler.update()

    other = copy.deepcopy(model)
    run(model, torch.amp.GradScaler("cpu", init_scale=2.0**13))
    run(other, torch.amp.GradScaler("cpu", enabled=False))
    torch.testing.assert_close(values(model), values(other))


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain Adam", "fused Adam"])
@pytest.mark.parametrize("stepped", ["wrapper", "inner"])
def test_an_overflow_in_one_task_skips_the_step_and_lowers_the_scale(model, x, options, stepped):
    inner = torch.optim.Adam(model.parameters(), lr=0.05, **options)
    optimizer = fixed(inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = values(model)
    first, second, third = losses_of(model, x)
    optimizer.pc_backward([scaler.scale(first), scaler.scale(second) * torch.inf, scaler.scale(third)])
    scaler.step({"wrapper": optimizer, "inner": inner}[stepped])
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    optimizer.zero_grad()
    optimizer.pc_backward([scaler.scale(loss) for loss in losses_of(model, x)])
    scaler.step(optimizer)
    scaler.update()
    assert all((p != b).any() and p.isfinite().all() for p, b in zip(model.parameters(), before, strict=True))


def test_clipping_scales_the_merged_gradient_in_place(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.pc_backward(losses_of(model, x))
    before = [p.grad.clone() for p in model.parameters()]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in before]).norm())
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], [g * 0.01 / norm for g in before], rtol=1e-4, atol=0.0
    )


def test_a_nan_reaches_grad_at_its_place(model, x):
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    first, second, _ = losses_of(model, x)
    optimizer.pc_backward([first, second, model.heads[2].weight[0, 3] * torch.nan])
    wrong = [int(p.grad.isnan().sum()) for p in model.parameters() if p.grad is not None]
    assert model.heads[2].weight.grad[0, 3].isnan() and sum(wrong) == 1


def test_zero_gradients_give_no_nan(model, x):
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.pc_backward([loss * 0 for loss in losses_of(model, x)])
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_the_merged_gradient_scales_with_the_losses(model, x, scale):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.pc_backward(losses_of(model, x))
    expected = [p.grad.double() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.pc_backward([loss * scale for loss in losses_of(model, x)])
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.double() / scale, e, rtol=1e-4, atol=1e-6)
