"""Steps without surgery, single losses and repeated calls: what most likely was not meant is said once."""

import copy
import functools
import pickle
import warnings

import pytest
import torch

import fastpcgrad
from fastpcgrad import FastPCGradWarning, _warnings

FIXED = "tensorflow"
"""A variant that draws nothing."""

x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return torch.nn.Linear(5, 2)


def losses_of(model):
    left, right = model(x).unbind(1)
    return [left.mean() - right.square().mean(), right.square().mean() - left.mean() + 0.5 * right.mean()]


def wrap(model, **options):
    return fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), variant=FIXED, **options)


def caught(action):
    """The messages of the package's warnings, each at a line of this file."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    assert all(w.category is FastPCGradWarning and w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("stepped", ["wrapper", "wrapped", "scaler", "closure"])
def test_a_step_that_no_surgery_came_before_says_once_what_to_call(model, stepped):
    optimizer = wrap(model)

    def closure():
        optimizer.zero_grad()
        loss = sum(losses_of(model))
        loss.backward()
        return loss

    def step():
        if stepped == "closure":  # as trainers with automatic optimization call it
            optimizer.step(closure)
            return
        closure()
        if stepped == "scaler":
            scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
            scaler.scale(torch.ones(()))  # what it needs before a step
            scaler.step(optimizer)
        else:
            {"wrapper": optimizer, "wrapped": optimizer.optimizer}[stepped].step()

    (message,) = caught(step)
    assert "pc_backward" in message
    assert caught(step) == []


def test_a_step_without_gradients_says_nothing(model):
    optimizer = wrap(model)
    assert caught(optimizer.step) == []


def test_plain_steps_between_surgeries_say_nothing(model):
    optimizer = wrap(model)

    def train():
        for surgery in (True, False, True, False):
            optimizer.zero_grad()
            if surgery:
                optimizer.pc_backward(losses_of(model))
            else:
                sum(losses_of(model)).backward()
            optimizer.step()

    assert caught(train) == []


def test_a_closure_that_makes_a_surgery_says_nothing(model):
    optimizer = fastpcgrad.PCGrad(torch.optim.LBFGS(model.parameters(), max_iter=3), variant=FIXED)

    def closure():
        optimizer.zero_grad()
        losses = losses_of(model)
        optimizer.pc_backward(losses)
        return sum(losses)

    assert caught(lambda: optimizer.step(closure)) == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_knows_what_its_original_did(model, duplicate):
    optimizer = wrap(model)
    optimizer.pc_backward(losses_of(model))
    other_model, other = duplicate((model, optimizer))
    sum(losses_of(other_model)).backward()
    assert caught(other.step) == []


def test_a_single_loss_is_summed_up_most_likely(model, monkeypatch):
    monkeypatch.setattr(_warnings, "_said", set())
    optimizer = wrap(model)

    def one():
        optimizer.zero_grad()
        optimizer.pc_backward([sum(losses_of(model))])
        optimizer.step()

    (message,) = caught(one)
    assert "one loss" in message
    assert caught(one) == []


# Fewer losses than tasks.


def three_losses(model):
    left, right = losses_of(model)
    return [left, right, left.square() + right]


def gradvac_after(model, front_end, second):
    """A front end that has merged three tasks with one GradVac, and what it then does with the second losses."""
    method = fastpcgrad.methods.GradVac()
    if front_end == "PCGrad":
        optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.0), method=method, on_repeat="add")
        run = optimizer.pc_backward
    else:
        run = functools.partial(fastpcgrad.backward, method=method)
    run(three_losses(model))
    return method, lambda: run(second(three_losses(model)))


@pytest.mark.parametrize("front_end", ["PCGrad", "backward"])
def test_a_list_without_its_absent_task_is_named(model, front_end, monkeypatch):
    """What GradVac knows of tasks 0 and 1 would become that of 0 and 2; None in its place leaves it alone."""
    monkeypatch.setattr(_warnings, "_said", set())
    method, filtered = gradvac_after(model, front_end, lambda losses: [losses[0], losses[2]])
    (message,) = caught(filtered)
    assert all(word in message for word in ("2 losses", "GradVac", "3 tasks", "None", "reset()"))
    assert caught(filtered) == []
    method, absent = gradvac_after(model, front_end, lambda losses: [losses[0], None, losses[2]])
    before = method.state_dict()["phi"]
    monkeypatch.setattr(_warnings, "_said", set())
    assert caught(absent) == []
    after = method.state_dict()["phi"]
    assert torch.equal(before[:, 1], after[:, 1]) and before[0, 2] != after[0, 2]


@pytest.mark.parametrize("front_end", ["PCGrad", "backward"])
@pytest.mark.parametrize("second", ["absent last", "after reset()"])
def test_a_list_that_is_right_says_nothing(model, front_end, second, monkeypatch):
    monkeypatch.setattr(_warnings, "_said", set())
    cut = (lambda losses: [*losses[:2], None]) if second == "absent last" else (lambda losses: losses[:2])
    method, run = gradvac_after(model, front_end, cut)
    if second == "after reset()":
        method.reset()
    assert caught(run) == []


# Repeated calls.


def twice(model, optimizer, between=lambda: None):
    optimizer.pc_backward(losses_of(model))
    first = gradients(model)
    between()
    optimizer.pc_backward([2 * loss for loss in losses_of(model)])
    return first, gradients(model)


def test_a_second_call_replaces_the_gradients_of_the_first_and_says_so_once(model):
    optimizer = wrap(model)
    results = []
    (message,) = caught(lambda: results.append(twice(model, optimizer)))
    first, second = results[0]
    torch.testing.assert_close(second, [2 * g for g in first])
    assert "on_repeat='add'" in message
    assert caught(lambda: twice(model, optimizer)) == []


@pytest.mark.parametrize("row_dtype", [None, torch.float64])
def test_calls_add_up_where_that_is_asked_for(model, row_dtype):
    optimizer = wrap(model, on_repeat="add", row_dtype=row_dtype)
    results = []
    assert caught(lambda: results.append(twice(model, optimizer))) == []
    first, second = results[0]
    torch.testing.assert_close(second, [3 * g for g in first])
    optimizer.zero_grad()
    optimizer.pc_backward(losses_of(model))
    torch.testing.assert_close(gradients(model), first)


def test_what_other_passes_left_adds_up_too(model):
    optimizer = wrap(model, on_repeat="add")
    optimizer.pc_backward(losses_of(model))
    merged = gradients(model)
    optimizer.zero_grad()
    sum(losses_of(model)).backward()
    before = gradients(model)
    optimizer.pc_backward(losses_of(model))
    torch.testing.assert_close(gradients(model), [a + b for a, b in zip(before, merged, strict=True)])


def test_a_parameter_that_the_second_call_does_not_touch_keeps_what_the_first_gave_it(model):
    optimizer = wrap(model, on_repeat="add")
    optimizer.pc_backward(losses_of(model))
    first = gradients(model)
    optimizer.pc_backward([model.bias[0], -model.bias.sum()])
    assert torch.equal(model.weight.grad, first[0]) and not torch.equal(model.bias.grad, first[1])


def test_what_adds_up_is_there_again_where_a_call_fails(model):
    optimizer = wrap(model, on_repeat="add")
    optimizer.pc_backward(losses_of(model))
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    losses = losses_of(model)
    losses[0].backward()
    for p, (grad, _) in zip(model.parameters(), before, strict=True):
        p.grad = grad
    values = gradients(model)
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.pc_backward(losses)
    assert all(p.grad is grad for p, (grad, _) in zip(model.parameters(), before, strict=True))
    torch.testing.assert_close(gradients(model), values, rtol=0, atol=0)


def test_a_second_call_is_an_error_where_that_is_asked_for(model):
    optimizer = wrap(model, on_repeat="raise")
    optimizer.pc_backward(losses_of(model))
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"zero_grad\(\)"):
        optimizer.pc_backward(losses_of(model))
    assert all(p.grad is grad and torch.equal(grad, v) for p, (grad, v) in zip(model.parameters(), before, strict=True))


def clear_by_hand(model):
    for p in model.parameters():
        p.grad = None


CLEARED = {
    "set to None": lambda model, optimizer: optimizer.zero_grad(),
    "set to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "by the model": lambda model, optimizer: model.zero_grad(),
    "to zero by the model": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "by the wrapped one": lambda model, optimizer: optimizer.optimizer.zero_grad(),
    "by hand": lambda model, optimizer: clear_by_hand(model),
}


@pytest.mark.parametrize("on_repeat", ["replace", "add", "raise"])
@pytest.mark.parametrize("clear", CLEARED.values(), ids=CLEARED)
def test_gradients_that_were_cleared_in_any_way_are_no_repeat(model, clear, on_repeat):
    optimizer = wrap(model, on_repeat=on_repeat)
    results = []
    assert caught(lambda: results.append(twice(model, optimizer, lambda: clear(model, optimizer)))) == []
    first, second = results[0]
    torch.testing.assert_close(second, [2 * g for g in first])


def test_gradients_that_a_step_has_used_may_be_replaced(model):
    """Scripts of the original need no zero_grad(): every call replaces what is there."""
    optimizer = wrap(model)
    assert caught(lambda: twice(model, optimizer, optimizer.step)) == []


def test_a_wrong_choice_is_named(model):
    with pytest.raises(ValueError, match=r"on_repeat must be 'replace', 'add' or 'raise'; found 'sum'"):
        wrap(model, on_repeat="sum")
