"""PCGrad(optimizer) as a drop-in and as a torch.optim.Optimizer, with all that usually surrounds one."""

import copy
import gc
import pickle
import random
import weakref
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpcgrad
from fastpcgrad import methods, reference
from tests.test_autograd import BAD_LOSSES


class Model(nn.Module):
    """A trunk and one head a task; the trunk's first layer can be made larger than what hooks wait for."""

    def __init__(self, width=6, tasks=3):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(tasks))

    def forward(self, x):
        features = self.trunk(x)
        return [head(features) for head in self.heads]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def x():
    return torch.randn(16, 4)


def losses_of(model, x, trunk=None):
    """Losses that conflict: each task wants another output from nearly the same head."""
    outputs = model(x) if trunk is None else [head(trunk(x)) for head in model.heads]
    return [(output - 3 * (-1) ** t).square().mean() for t, output in enumerate(outputs)]


def task_gradients(losses, parameters):
    """In float64, as the oracle wants them."""
    tasks = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return [[None if g is None else g.double() for g in task] for task in tasks]


def fixed(optimizer, **options):
    """A wrapper that draws no random numbers."""
    return fastpcgrad.PCGrad(optimizer, variant="tensorflow", **options)


def assert_grad(parameters, expected):
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, None if e is None else e.to(p.dtype))


def assert_merged(parameters, losses, of=None):
    """``.grad`` of ``parameters`` is what the oracle makes of the losses (of parameters like them)."""
    of = parameters if of is None else of
    like = [p.detach().double() for p in of]
    assert_grad(parameters, reference.merge(task_gradients(losses, of), like, "tensorflow"))


def train(model, optimizer, x, steps=3, after_step=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.pc_backward(losses_of(model, x))
        optimizer.step()
        after_step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same_values(model, other):
    torch.testing.assert_close(values(model), values(other), rtol=0, atol=0)


# What users of the original have.


def test_the_tutorials_example_trains():
    """The published tutorial, with its import changed."""
    from fastpcgrad import PCGrad

    class SimpleModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(10, 50)
            self.fc2 = nn.Linear(50, 1)

        def forward(self, x):
            x = torch.relu(self.fc1(x))
            x = self.fc2(x)
            return x

    model = SimpleModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pcgrad_optimizer = PCGrad(optimizer)

    input_data = torch.randn(64, 10)
    target_data1 = torch.randn(64, 1)
    target_data2 = torch.randn(64, 1)

    criterion = nn.MSELoss()
    sums = []
    for _ in range(10):
        optimizer.zero_grad()

        output1 = model(input_data)
        output2 = model(input_data)

        loss1 = criterion(output1, target_data1)
        loss2 = criterion(output2, target_data2)

        pcgrad_optimizer.pc_backward([loss1, loss2])
        optimizer.step()
        sums.append(loss1.item() + loss2.item())
    assert sums[-1] < sums[0]


def test_the_default_is_the_variant_of_the_widely_used_implementation(model, x):
    parameters, losses = list(model.parameters()), losses_of(model, x)
    random.seed(3)
    expected = reference.merge(task_gradients(losses, parameters), [p.double() for p in parameters], "pytorch-pcgrad")
    random.seed(3)
    fastpcgrad.PCGrad(torch.optim.Adam(parameters)).pc_backward(losses)
    assert_grad(parameters, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reduction_may_be_given_by_position(model, x, reduction):
    parameters, losses = list(model.parameters()), losses_of(model, x)
    random.seed(3)
    expected = reference.merge(
        task_gradients(losses, parameters), [p.double() for p in parameters], "pytorch-pcgrad", reduction=reduction
    )
    random.seed(3)
    fastpcgrad.PCGrad(torch.optim.Adam(parameters), reduction).pc_backward(losses)
    assert_grad(parameters, expected)


def test_any_method_takes_the_place_of_a_variant(model, x):
    class Sum(methods.Method):
        def solve(self, gram):
            return methods.Solution(torch.ones(len(gram), dtype=torch.float64), None)

    losses = losses_of(model, x)
    fastpcgrad.PCGrad(torch.optim.SGD(model.parameters()), method=Sum()).pc_backward(losses, retain_graph=True)
    assert_grad(model.parameters(), torch.autograd.grad(sum(losses), list(model.parameters())))


def test_the_report_is_that_of_the_last_surgery(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    assert optimizer.report is None
    losses = losses_of(model, x)
    parameters = list(model.parameters())
    norms = [sum(g.square().sum() for g in task if g is not None).sqrt() for task in task_gradients(losses, parameters)]
    optimizer.pc_backward(losses)
    assert isinstance(optimizer.report, fastpcgrad.ConflictReport)
    torch.testing.assert_close(optimizer.report.norms, torch.stack(norms))
    first = optimizer.report
    optimizer.zero_grad()
    optimizer.pc_backward(losses_of(model, x)[:2])
    assert optimizer.report is not first and optimizer.report.tasks == (0, 1)


def test_one_tensor_of_losses_will_do(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    expected = losses_of(model, x)
    optimizer.pc_backward(torch.stack(losses_of(model, x)))
    assert_merged(list(model.parameters()), expected)


def test_losses_of_one_element_and_iterators_of_losses_will_do(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.pc_backward(loss[None] for loss in losses_of(model, x))
    assert_merged(list(model.parameters()), losses_of(model, x))


def test_the_number_of_tasks_may_change_from_step_to_step(x):
    model = Model(tasks=5)
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    for count in (2, 5, 4, 3, 5):
        optimizer.zero_grad()
        optimizer.pc_backward(losses_of(model, x)[:count])
        assert_merged(list(model.parameters()), losses_of(model, x)[:count])
        optimizer.step()


def test_a_retained_graph_takes_a_second_pass_and_one_that_is_not_is_freed(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    losses = losses_of(model, x)
    optimizer.pc_backward(losses, retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.pc_backward(losses)
    torch.testing.assert_close([p.grad for p in model.parameters()], first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        losses[-1].backward()


# A torch.optim.Optimizer.


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


# Mixed precision and clipping.


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


# What a task's graph may hold.


def test_large_parameters_give_the_numbers_of_small_ones(x):
    """So large that the work is spread over threads."""
    model = Model(width=1 << 16)
    parameters = list(model.parameters())
    optimizer = fixed(torch.optim.SGD(parameters, lr=1e-5))
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.pc_backward(losses_of(model, x))
        assert_merged(parameters, losses_of(model, x))
        optimizer.step()


def test_tied_parameters_have_the_sum_of_their_uses(x):
    tied = nn.Linear(4, 4)
    optimizer = fixed(torch.optim.SGD(tied.parameters(), lr=0.1))

    def losses():
        output = tied(tied(x)) + x @ tied.weight
        return [output[:, 0].sum(), -output.sum()]

    optimizer.pc_backward(losses())
    assert_merged(list(tied.parameters()), losses())


def test_gradients_with_a_graph_of_their_own(model, x):
    """A gradient penalty: create_graph=True inside the forward of each task."""
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))

    def losses():
        inputs = x.clone().requires_grad_()
        plain = losses_of(model, inputs)
        return [loss + torch.autograd.grad(loss, inputs, create_graph=True)[0].square().sum() for loss in plain]

    optimizer.pc_backward(losses())
    assert not any(p.grad.requires_grad for p in model.parameters())
    parameters = list(model.parameters())
    assert_merged(parameters, losses())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")  # the cycle that it warns of is broken at once
def test_backward_with_create_graph_inside_a_task(model, x):
    rounds = fastpcgrad.GradientSurgery(model.parameters(), 3, methods.PCGrad("tensorflow"))
    parameters = list(model.parameters())
    for t, loss in enumerate(losses_of(model, x)):
        with rounds.task(t):
            loss.backward(create_graph=True)
    rounds.merge()
    assert not any(p.grad.requires_grad for p in parameters)
    assert_merged(parameters, losses_of(model, x))


def test_parameters_whose_gradients_autograd_makes_views_of_one_tensor():
    a, b = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
    optimizer = fixed(torch.optim.SGD([a, b], lr=0.1))
    weights = torch.randn(2, 6)

    def losses():
        both = a.view(-1) + b.view(-1)
        return [(both * w).sum() for w in weights]

    optimizer.pc_backward(losses())
    assert a.grad.data_ptr() != b.grad.data_ptr()
    assert_merged([a, b], losses())


def test_sparse_gradients_become_dense():
    embedding = nn.Embedding(6, 3, sparse=True)
    optimizer = fixed(torch.optim.SGD(embedding.parameters(), lr=0.1))
    dense = nn.Embedding.from_pretrained(embedding.weight.detach().clone(), freeze=False)

    def losses(module):
        return [module(torch.tensor([0, 1, 1])).sum(), -module(torch.tensor([1, 5])).sum()]

    optimizer.pc_backward(losses(embedding))
    assert embedding.weight.grad.layout == torch.strided
    assert_merged([embedding.weight], losses(dense), [dense.weight])
    optimizer.step()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_models(model, x, use_reentrant):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    inputs = x.clone().requires_grad_()

    def trunk(z):
        return checkpoint(model.trunk, z, use_reentrant=use_reentrant)

    optimizer.pc_backward(losses_of(model, inputs, trunk))
    parameters = list(model.parameters())
    assert_merged(parameters, losses_of(model, x))


def test_a_compiled_model_with_a_forward_for_each_task(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.pc_backward([losses_of(compiled, x)[t] for t in range(3)])
        parameters = list(model.parameters())
        assert_merged(parameters, losses_of(model, x))
        optimizer.step()


def test_pc_backward_works_where_grad_mode_is_off(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    losses = losses_of(model, x)
    with torch.no_grad():
        optimizer.pc_backward(losses)
    assert_merged(list(model.parameters()), losses_of(model, x))


# Several wrappers, and what is left when one goes.


@pytest.mark.parametrize("row_dtype", [None, torch.float64])
def test_two_wrappers_on_one_model_do_not_disturb_each_other(x, row_dtype):
    model = Model()
    parameters = list(model.parameters())
    inner = torch.optim.SGD(parameters, lr=0.1)
    first, second = fixed(inner, row_dtype=row_dtype), fixed(inner, row_dtype=row_dtype)
    for optimizer, count in ((first, 3), (second, 2), (first, 2), (first, 3), (second, 3)):
        inner.zero_grad()
        optimizer.pc_backward(losses_of(model, x)[:count])
        assert_merged(parameters, losses_of(model, x)[:count])


def test_a_wrapper_that_is_gone_leaves_no_rows(model, x):
    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1), row_dtype=torch.float64)
    optimizer.pc_backward(losses_of(model, x))
    largest = max(model.parameters(), key=torch.numel)
    surgery = optimizer._surgery
    gone = [weakref.ref(held) for held in (optimizer, surgery, surgery._layouts.current.capture.rows)]
    kept = largest.grad.clone()
    del optimizer, surgery
    gc.collect()
    assert [reference_() for reference_ in gone] == [None] * 3
    assert torch.equal(largest.grad, kept)
    losses_of(model, x)[0].backward()


# What goes wrong.


def everything(optimizer):
    """All state that a refused call must not touch."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in parameters],
        "parameters": [p.tolist() for p in parameters],
        "optimizer": repr(optimizer.state_dict()),
        "generators": (random.getstate(), torch.get_rng_state().tolist()),
        "report": id(optimizer.report),
        "rows": optimizer._surgery._layouts.current.capture.rows.tasks,
    }


@pytest.mark.parametrize(("losses", "error", "words"), BAD_LOSSES)
def test_bad_losses_are_named_and_nothing_changes(model, x, losses, error, words):
    optimizer = fastpcgrad.PCGrad(torch.optim.Adam(model.parameters()))
    train(model, optimizer, x, steps=2)
    before = everything(optimizer)
    with pytest.raises(error) as caught:
        optimizer.pc_backward(losses)
    assert all(word in str(caught.value) for word in words), caught.value
    assert everything(optimizer) == before


def test_parameters_that_cannot_be_packed_are_refused_before_anything_changes(model, x):
    """A parameter of a dtype that rows cannot have, added later."""
    optimizer = fastpcgrad.PCGrad(torch.optim.Adam(model.parameters()))
    train(model, optimizer, x, steps=2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn))]})
    before = everything(optimizer)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        optimizer.pc_backward(losses_of(model, x))
    assert everything(optimizer) == before


def test_a_failing_backward_leaves_no_half_merged_gradient_and_the_next_surgery_is_right(model, x):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    optimizer = fixed(torch.optim.SGD(model.parameters(), lr=0.1))
    first, second, third = losses_of(model, x)
    mine = [torch.full_like(p, 5.0) for p in model.parameters()]
    for p, grad in zip(model.parameters(), mine, strict=True):
        p.grad = grad
    with pytest.raises(ZeroDivisionError):
        optimizer.pc_backward([first, Fails.apply(second), third])
    assert all(p.grad is grad and (grad == 5).all() for p, grad in zip(model.parameters(), mine, strict=True))
    optimizer.pc_backward(losses_of(model, x))
    assert_merged(list(model.parameters()), losses_of(model, x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"optimizer": [torch.zeros(1, requires_grad=True)]}, TypeError, ["optimizer", "list"]),
        ({"reduction": "average"}, ValueError, ["reduction", "average", "mean"]),
        ({"variant": "pcgrad"}, ValueError, ["variant", "pcgrad", "libmtl"]),
        ({"method": "paper"}, TypeError, ["method", "paper"]),
        ({"method": methods.PCGrad(), "variant": "paper"}, ValueError, ["method", "variant='paper'"]),
        ({"method": methods.PCGrad(), "reduction": "sum"}, ValueError, ["method", "reduction='sum'"]),
        ({"generator": 7}, TypeError, ["generator", "7"]),
        ({"shared": torch.zeros(1)}, TypeError, ["shared", "single tensor"]),
        ({"shared": [torch.zeros(3, requires_grad=True)]}, ValueError, ["shared", "[3]"]),
        ({"row_dtype": torch.int32}, TypeError, ["int32"]),
        ({"process_group": object()}, TypeError, ["process_group", "object"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_bad_choices_name_what_was_found(options, error, words):
    options = {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), **options}
    with pytest.raises(error) as caught:
        fastpcgrad.PCGrad(**options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_optimizer_without_trainable_parameters_does_nothing():
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD([frozen], lr=0.1))
    other = torch.ones(2, requires_grad=True)
    optimizer.pc_backward([other.sum(), other.square().sum()])
    optimizer.step()
    assert frozen.grad is None and frozen.tolist() == [1, 1, 1]
