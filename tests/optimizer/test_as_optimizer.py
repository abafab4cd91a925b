"""PCGrad(optimizer) as a torch.optim.Optimizer, with all that usually surrounds one."""

import copy
import pickle
import random
from collections import defaultdict

import pytest
import torch
from torch import nn

import fastpcgrad

from .models import assert_grad, assert_merged, assert_same_values, fixed, losses_of, train, values


def test_it_is_an_optimizer_whose_parts_are_those_of_the_wrapped_one(model):
    inner = torch.optim.AdamW(model.parameters(), lr=0.3)
    optimizer = fastpcgrad.PCGrad(inner)
    assert isinstance(optimizer, torch.optim.Optimizer) and optimizer.optimizer is inner
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state and optimizer.defaults is inner.defaults
    optimizer.param_groups[0]["lr"] = 0.5
    assert inner.param_groups[0]["lr"] == 0.5
    assert "AdamW" in repr(optimizer) and "pytorch-pcgrad" in repr(optimizer)


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scheduled", ["wrapper", "inner"])
@pytest.mark.parametrize("stepped", ["wrapper", "inner"])
def test_learning_rate_schedulers_work_on_the_wrapper_and_on_the_wrapped(model, x, name, scheduled, stepped):
    """Without warnings, and with the rates that they give a plain optimizer."""

    def rates(optimizer, wrapper, step):
        scheduler, found = SCHEDULERS[name](optimizer), []
        for _ in range(6):
            wrapper.zero_grad()
            wrapper.pc_backward(losses_of(model, x))
            step.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            found.append((wrapper.param_groups[0]["lr"], wrapper.param_groups[0]["momentum"]))
        return found

    plain = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1, momentum=0.9)
    scheduler, expected = SCHEDULERS[name](plain), []
    for _ in range(6):
        plain.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        expected.append((plain.param_groups[0]["lr"], plain.param_groups[0]["momentum"]))

    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapper = fastpcgrad.PCGrad(inner)
    either = {"wrapper": wrapper, "inner": inner}
    assert rates(either[scheduled], wrapper, either[stepped]) == expected


@pytest.mark.parametrize(("saved", "loaded"), [("wrapper", "inner"), ("inner", "wrapper"), ("wrapper", "wrapper")])
def test_a_state_dict_of_one_loads_into_the_other(model, x, saved, loaded):
    """Training goes on from a checkpoint as if it had not stopped."""
    inner = torch.optim.Adam(model.parameters(), lr=0.05)
    optimizer = fixed(inner)
    train(model, optimizer, x)
    checkpointed = copy.deepcopy({"wrapper": optimizer, "inner": inner}[saved].state_dict())
    resumed = copy.deepcopy(model)
    train(model, optimizer, x)

    other_inner = torch.optim.Adam(resumed.parameters(), lr=0.9)
    other = fixed(other_inner)
    {"wrapper": other, "inner": other_inner}[loaded].load_state_dict(checkpointed)
    train(resumed, other, x)
    assert_same_values(resumed, model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies_of_a_wrapper_train_alike_and_apart(model, x, duplicate):
    inner = torch.optim.Adam(model.parameters(), lr=0.05)
    optimizer = fastpcgrad.PCGrad(inner, generator=random.Random(5), shared=model.trunk.parameters())
    train(model, optimizer, x)
    before = values(model)
    other_model, other = duplicate((model, optimizer))
    assert isinstance(other, fastpcgrad.PCGrad) and other.optimizer is not inner
    train(other_model, other, x)
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    train(model, optimizer, x)
    assert_same_values(other_model, model)


def test_a_copy_keeps_the_rows_dtype_and_the_method(model):
    optimizer = fastpcgrad.PCGrad(
        torch.optim.SGD(model.parameters()), "sum", variant="libmtl", row_dtype=torch.bfloat16
    )
    other = copy.deepcopy(optimizer)
    assert repr(other) == repr(optimizer)
    assert other._surgery.nbytes == optimizer._surgery.nbytes


def test_step_hooks_run_once_whichever_step_is_called(model, x):
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer, calls = fixed(inner), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before"))
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    optimizer.pc_backward(losses_of(model, x))
    optimizer.step()
    assert calls == ["before", "after"]
    inner.step()
    assert calls == ["before", "after"] * 2
    handle.remove()
    optimizer.step()
    assert calls == [*["before", "after"] * 2, "before"]


def test_state_dict_hooks_run(model):
    optimizer, calls = fixed(torch.optim.SGD(model.parameters(), lr=0.1)), []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, state: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "saved", "load", "loaded"]


def test_step_takes_a_closure(model, x):
    """As LBFGS needs it: several surgeries a step."""
    optimizer = fixed(torch.optim.LBFGS(model.parameters(), max_iter=4))
    evaluated = []

    def closure():
        optimizer.zero_grad()
        losses = losses_of(model, x)
        optimizer.pc_backward(losses)
        evaluated.append(sum(losses).item())
        return sum(losses).detach()

    first = optimizer.step(closure)
    assert len(evaluated) > 1 and first.item() == pytest.approx(evaluated[0])
    assert all(p.isfinite().all() for p in model.parameters())


def test_step_returns_what_the_wrapped_step_returns(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.pc_backward(losses_of(model, x))
    assert optimizer.step() is None
    assert optimizer.step(lambda: 42.0) == 42.0


def test_a_group_that_is_added_takes_part_from_the_next_surgery_on(model, x):
    late = nn.Linear(4, 5)
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.pc_backward(losses_of(model, x))
    optimizer.add_param_group({"params": late.parameters(), "lr": 0.01})
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.1, 0.01]

    def trunk(z):
        return model.trunk(z) + late(z)

    parameters = [*model.parameters(), *late.parameters()]
    optimizer.zero_grad()
    optimizer.pc_backward(losses_of(model, x, trunk))
    assert_merged(parameters, losses_of(model, x, trunk))


def test_a_group_that_is_added_after_a_checkpoint_was_loaded_takes_part(model, x):
    """Loading a state dict gives an optimizer a new list of groups."""
    late = nn.Linear(4, 5)
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.pc_backward(losses_of(model, x))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": late.parameters()})

    def trunk(z):
        return model.trunk(z) + late(z)

    parameters = [*model.parameters(), *late.parameters()]
    optimizer.zero_grad()
    optimizer.pc_backward(losses_of(model, x, trunk))
    assert_merged(parameters, losses_of(model, x, trunk))


def test_a_model_may_be_cast_between_steps(model, x):
    """The parameters stay the same objects; rows of their old dtype would round their gradients."""
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.pc_backward(losses_of(model, x))
    optimizer.zero_grad()
    model.double()
    optimizer.pc_backward(losses_of(model, x.double()))
    merged = [p.grad for p in model.parameters()]
    fixed(torch.optim.SGD(model.parameters(), lr=0.1)).pc_backward(losses_of(model, x.double()))
    torch.testing.assert_close(merged, [p.grad for p in model.parameters()], rtol=1e-12, atol=0)


def test_groups_and_state_that_are_assigned_are_those_of_the_wrapped_one(model, x):
    """As code does that resets an optimizer or filters its groups."""
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = fixed(inner)
    train(model, optimizer, x)
    optimizer.state = defaultdict(dict)
    assert inner.state is optimizer.state and not inner.state
    optimizer.param_groups = [{**inner.param_groups[0], "params": list(model.trunk.parameters())}]
    assert inner.param_groups is optimizer.param_groups
    optimizer.zero_grad()
    optimizer.pc_backward(losses_of(model, x))
    assert_merged(list(model.trunk.parameters()), losses_of(model, x))


@pytest.mark.parametrize("variant", ["paper", "pytorch-pcgrad", "tensorlogic"])
def test_the_default_device_does_not_matter(model, x, variant):
    found = []
    for device in ("cpu", "meta"):
        optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), variant=variant)
        losses = losses_of(model, x)
        random.seed(1)
        torch.manual_seed(1)
        with torch.device(device):
            optimizer.pc_backward(losses)
        found.append([p.grad.clone() if p.grad is not None else None for p in model.parameters()])
    assert_grad(model.parameters(), found[0])


def test_parameters_may_be_frozen_and_unfrozen_between_steps(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    for frozen in (None, model.trunk[0].weight, None, model.heads[1].bias):
        optimizer.zero_grad()
        for p in model.parameters():
            p.requires_grad_(p is not frozen)
        optimizer.pc_backward(losses_of(model, x))
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert_merged(parameters, losses_of(model, x))
        assert frozen is None or frozen.grad is None
        optimizer.step()


def test_what_no_task_touches_has_no_gradient_and_is_not_decayed(model, x):
    unused = nn.Parameter(torch.ones(3))
    optimizer = fastpcgrad.PCGrad(torch.optim.AdamW([*model.parameters(), unused], lr=0.1, weight_decay=0.5))
    for _ in range(2):
        optimizer.pc_backward(losses_of(model, x)[:2])
        optimizer.step()
    assert unused.grad is None and unused.tolist() == [1, 1, 1]
    assert all(p.grad is None for p in model.heads[2].parameters())
    assert all(p.grad is not None for p in model.heads[1].parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_between_steps(model, x, set_to_none):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        optimizer.pc_backward(losses_of(model, x))
        assert_merged(list(model.parameters()), losses_of(model, x))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
        assert set_to_none or not any(p.grad.any() for p in model.parameters())


def test_pc_backward_replaces_what_was_in_grad(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    optimizer.pc_backward(losses_of(model, x))
    assert_merged(list(model.parameters()), losses_of(model, x))
