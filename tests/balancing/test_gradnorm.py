"""GradNorm the balancer: hand-worked updates, the double backward, streaming, surgery."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fastpcgrad import GradientSurgery, PCGrad
from fastpcgrad.balancing import GradNorm
from fastpcgrad.balancing.gradnorm import layer_norms

SGD = partial(torch.optim.SGD, lr=0.1)


class ToyNet(nn.Module):
    def __init__(self, tasks):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(tasks))

    def forward(self, x, y):
        shared = self.trunk(x).tanh()
        return [(head(shared) - target).square().mean() for head, target in zip(self.heads, y, strict=True)]


def problem(tasks, steps):
    torch.manual_seed(tasks)
    net = ToyNet(tasks).double()
    scales = torch.logspace(0, 2, tasks, dtype=torch.float64)[:, None, None]
    data = [
        (torch.rand(7, 6, dtype=torch.float64), scales * torch.randn(tasks, 7, 3, dtype=torch.float64))
        for _ in range(steps)
    ]
    return net, data


def note(balancer, losses, norms):
    for t, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        balancer.note(t, torch.tensor(loss), torch.tensor(norm))


def test_an_update_worked_by_hand():
    """Norms 1 and 3, mean 2. Ratios 1/2 and 1, mean 3/4: targets 4/3 and 8/3 for α = 1. So w − 0.1 (−1, 3), scaled."""
    balancer = GradNorm(2, alpha=1.0, optimizer=SGD, initial_losses=[2.0, 4.0])
    note(balancer, [1.0, 4.0], [1.0, 3.0])
    balancer.update()
    torch.testing.assert_close(balancer.weights.data, torch.tensor([1.1, 0.7]) / 1.8 * 2)


def test_a_weight_below_zero_is_differentiated_through_its_norm():
    """w = (−1, 3), norms 1 and 1: n = (1, 3), targets 2: n_1 is too small, so w_1 must fall further."""
    balancer = GradNorm(2, alpha=0.0, optimizer=SGD)
    balancer.weights.copy_(torch.tensor([-1.0, 3.0]))
    note(balancer, [1.0, 1.0], [1.0, 1.0])
    balancer.update()
    torch.testing.assert_close(balancer.weights.data, torch.tensor([-1.1, 2.9]) / 1.8 * 2)


def test_the_first_losses_are_the_initial_ones_unless_given():
    balancer, told = GradNorm(2, 1.0), GradNorm(2, 1.0, initial_losses=torch.tensor([5.0, 7.0]))
    for losses in ([2.0, 3.0], [1.0, 1.0]):
        for each in (balancer, told):
            note(each, losses, [1.0, 1.0])
            each.update()
    assert balancer.initial_losses.tolist() == [2.0, 3.0]
    assert told.initial_losses.tolist() == [5.0, 7.0]


def by_double_backward(net, data, alpha, lr):
    """Weights after each step, with a weights' Adam that lives on."""
    w = torch.ones(len(net.heads), dtype=torch.float64, requires_grad=True)
    weights_optimizer = torch.optim.Adam([w], lr=0.025)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    initial, log = None, []
    for batch in data:
        losses = torch.stack(net(*batch))
        initial = losses.detach() if initial is None else initial
        layer = net.trunk[-1].weight
        norms = torch.stack([torch.autograd.grad(x, layer, create_graph=True)[0].norm() for x in w * losses])
        rates = losses.detach() / initial
        targets = norms.mean().detach() * (rates / rates.mean()) ** alpha
        w.grad = torch.autograd.grad((norms - targets).abs().sum(), w, retain_graph=True)[0]
        optimizer.zero_grad()
        (w.detach() @ losses).backward()
        optimizer.step()
        weights_optimizer.step()
        with torch.no_grad():
            w *= len(w) / w.sum()
        log.append(w.detach().clone())
    return torch.stack(log)


@pytest.mark.parametrize(("tasks", "lr"), [(1, 1e-3), (2, 1e-5), (2, 1e-3), (5, 1e-3)])
def test_the_closed_form_is_the_double_backward(tasks, lr):
    net, data = problem(tasks, 80)
    expected = by_double_backward(copy.deepcopy(net), data, 1.5, lr)
    balancer = GradNorm(tasks, 1.5).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for step, batch in enumerate(data):
        losses = net(*batch)
        balancer.note_gradients(losses, net.trunk[-1])
        optimizer.zero_grad()
        sum(balancer(losses)).backward()
        optimizer.step()
        balancer.update()
        torch.testing.assert_close(balancer.weights.data, expected[step], rtol=1e-9, atol=0)
    torch.testing.assert_close(balancer.weights.sum().item(), float(tasks))
    assert tasks == 1 or (balancer.weights - 1).abs().max() > 0.2


def test_norms_over_several_tensors_and_of_stacked_losses():
    net, data = problem(3, 1)
    losses = net(*data[0])
    layer = list(net.trunk.parameters())
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(x, layer, retain_graph=True)]) for x in losses]
    expected = torch.stack(rows).norm(dim=1)
    torch.testing.assert_close(layer_norms(losses, layer), expected)
    torch.testing.assert_close(layer_norms(torch.stack(losses), layer), expected)
    torch.testing.assert_close(layer_norms(torch.stack(losses) * 2, layer), 2 * expected)


def test_the_norms_of_stacked_losses_are_not_touched_by_another_task():
    """From above the stack, zeros times an infinite derivative of another head would make NaN."""
    layer = torch.ones(2, requires_grad=True)
    losses = torch.stack([layer.sum(), (layer - 1).square().sum().sqrt()])
    assert layer_norms(losses, [layer])[0] == 2**0.5
    assert layer_norms(losses, [layer])[1].isnan()


def test_one_task_at_a_time_gives_what_all_at_once_gives():
    net, data = problem(3, 20)
    together, streaming = GradNorm(3, 0.12).double(), GradNorm(3, 0.12).double()
    for batch in data:
        losses = net(*batch)
        together.note_gradients(losses, net.trunk[-1])
        together.update()
        for t in (2, 0, 1):
            loss = net(*batch)[t]
            row = torch.autograd.grad(loss, net.trunk[-1].weight)[0]
            streaming.note(t, loss, row.norm())
        streaming.update()
    torch.testing.assert_close(together.weights, streaming.weights)


def test_weighted_losses_keep_the_weights_of_their_call():
    """An update between forward and backward changes nothing."""
    net, data = problem(2, 1)
    balancer = GradNorm(2, 0.12, partial(torch.optim.SGD, lr=10.0)).double()
    losses = net(*data[0])
    weighted = balancer(losses)
    balancer.note_gradients(losses, net.trunk[-1])
    balancer.update()
    found = torch.autograd.grad(sum(weighted), net.trunk[-1].weight, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(sum(losses), net.trunk[-1].weight)[0])


def test_with_gradient_surgery_the_rows_are_the_weighted_gradients():
    net, data = problem(2, 1)
    balancer = GradNorm(2, 0.12).double()
    balancer.weights.copy_(torch.tensor([1.5, 0.5]))
    expected = [
        weight * row
        for weight, row in zip([1.5, 0.5], layer_norms(net(*data[0]), list(net.parameters())).tolist(), strict=True)
    ]
    optimizer = PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.pc_backward(balancer(net(*data[0])))
    torch.testing.assert_close(optimizer.report.norms.tolist(), expected)
    surgery = GradientSurgery(net.parameters(), num_tasks=2)
    for t in range(2):
        with surgery.task(t):
            (balancer.weights[t] * net(*data[0])[t]).backward()
    torch.testing.assert_close(surgery.merge().norms.tolist(), expected)


def test_heads_are_touched_by_their_own_task_alone():
    """So that PCGrad sums, not averages, what only one task has."""
    net, data = problem(2, 1)
    balancer = GradNorm(2, 0.12).double()
    for weighted, other in zip(balancer(net(*data[0])), reversed(net.heads), strict=True):
        grads = torch.autograd.grad(weighted, list(other.parameters()), allow_unused=True, retain_graph=True)
        assert grads == (None, None)


def test_alpha_has_the_usual_value():
    assert GradNorm(2).alpha == 1.5


def test_a_resumed_run_gives_the_same_numbers(tmp_path):
    def advance(balancer, data):
        for batch in data:
            losses = net(*batch)
            balancer.note_gradients(losses, net.trunk[-1])
            balancer.update()

    net, data = problem(3, 20)
    straight = GradNorm(3, 0.5).double()
    advance(straight, data[:10])
    torch.save(straight.state_dict(), tmp_path / "state")
    resumed = GradNorm(3, 0.5).double()
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    copied = copy.deepcopy(straight)
    for balancer in (straight, resumed, copied):
        advance(balancer, data[10:])
    for balancer in (resumed, copied):
        assert torch.equal(balancer.weights, straight.weights)
        assert torch.equal(balancer.initial_losses, straight.initial_losses)


def test_a_dtype_change_takes_the_optimizers_state_along():
    balancer = GradNorm(2, 0.5)
    note(balancer, [1.0, 1.0], [1.0, 2.0])
    balancer.update()
    balancer.double()
    (state,) = balancer.optimizer.state.values()
    assert state["exp_avg"].dtype == balancer.weights.dtype == torch.float64
    note(balancer, [1.0, 1.0], [1.0, 2.0])
    balancer.update()
    torch.testing.assert_close(balancer.weights.data, torch.tensor([1.05, 0.95], dtype=torch.float64))


def test_another_optimizer_leaves_the_weights_alone():
    net, data = problem(2, 1)
    net.balancer = GradNorm(2, 0.12).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    losses = net(*data[0])
    net.balancer.note_gradients(losses, net.trunk[-1])
    net.balancer.update()
    before = net.balancer.weights.clone()
    sum(net.balancer(losses)).backward()
    optimizer.step()
    assert torch.equal(net.balancer.weights, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_what_is_not_finite_moves_no_weight(bad, where):
    balancer = GradNorm(3, 0.5, SGD)
    note(balancer, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    balancer.update()
    before = balancer.weights.tolist()
    assert before != [1.0, 1.0, 1.0]
    losses, norms = [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]
    (losses if where == "loss" else norms)[1] = bad
    note(balancer, losses, norms)
    balancer.update()
    assert balancer.weights.tolist() == before
    with pytest.raises(RuntimeError, match=r"tasks \[0, 1, 2\]"):
        balancer.update()


def test_an_update_needs_every_task_and_changes_nothing_without():
    balancer = GradNorm(3, 0.5)
    note(balancer, [1.0], [1.0])
    with pytest.raises(RuntimeError, match=r"tasks \[1, 2\]"):
        balancer.update()
    assert balancer.initial_losses.isnan().all() and balancer.weights.tolist() == [1.0] * 3


def test_a_note_serves_one_update():
    balancer = GradNorm(2, 0.5)
    note(balancer, [1.0, 1.0], [1.0, 2.0])
    balancer.update()
    before = balancer.weights.clone()
    with pytest.raises(RuntimeError, match=r"tasks \[0, 1\]"):
        balancer.update()
    assert torch.equal(balancer.weights, before)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_tasks": 0}, ValueError, ["num_tasks", "0"]),
        ({"num_tasks": 2.0}, ValueError, ["num_tasks", "2.0"]),
        ({"alpha": -1.0}, ValueError, ["alpha", "-1.0"]),
        ({"alpha": float("inf")}, ValueError, ["alpha", "inf"]),
        ({"optimizer": 0.1}, TypeError, ["optimizer", "0.1"]),
        ({"optimizer": len}, TypeError, ["optimizer", "1"]),
        ({"initial_losses": [1.0]}, ValueError, ["initial_losses", "2", "[1.0]"]),
        ({"initial_losses": [1.0, float("nan")]}, ValueError, ["initial_losses", "nan"]),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error) as caught:
        GradNorm(**({"num_tasks": 2, "alpha": 0.5} | arguments))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ((2, torch.ones(()), torch.ones(())), IndexError, ["task", "2"]),
        ((True, torch.ones(()), torch.ones(())), IndexError, ["task", "True"]),
        ((0, 1.0, torch.ones(())), TypeError, ["loss", "float"]),
        ((0, torch.ones(2), torch.ones(())), ValueError, ["loss", "[2]"]),
        ((0, torch.ones(()), torch.ones((), dtype=torch.int64)), TypeError, ["norm", "int64"]),
        ((0, torch.ones((), device="meta"), torch.ones(())), ValueError, ["loss", "cpu", "meta"]),
    ],
)
def test_bad_notes_are_named(values, error, words):
    with pytest.raises(error) as caught:
        GradNorm(2, 0.5).note(*values)
    assert all(word in str(caught.value) for word in words)


def test_a_loss_that_the_layer_does_not_reach_is_named():
    net, data = problem(2, 1)
    with pytest.raises(ValueError, match=r"losses\[1\].*layer"):
        GradNorm(2, 0.5).double().note_gradients(net(*data[0]), net.heads[0])
