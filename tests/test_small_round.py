"""Rounds of small models in one function: what they give, and leave to all other rounds, is what those give."""

import copy
import random
import sys

import pytest
import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods, variants
from fastpcgrad.merging import small_round
from fastpcgrad.rows.choice import SMALL

TASKS = 3
PLAIN = [name for name, variant in variants.VARIANTS.items() if variant.scope != "parameter"]


class Trunk(nn.Module):
    """Losses that all parameters take part in, or each with a head of its own."""

    def __init__(self, heads):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(TASKS if heads else 1))

    def forward(self, x):
        h = self.trunk(x)
        return [(self.heads[t % len(self.heads)](h) - 2 * (-1) ** t - t).square().mean() for t in range(TASKS)]


@pytest.fixture
def runs(monkeypatch):
    """What rounds of this kind returned; None: the rows were left to ``merge``."""
    monkeypatch.delitem(sys.modules, "torch._inductor.compile_fx", raising=False)  # of other tests of this process
    returned, run = [], small_round.SmallRound.run

    def counted(*arguments):
        report = run(*arguments)
        returned.append(report)
        return report

    monkeypatch.setattr(small_round.SmallRound, "run", counted)
    return returned


def trained(net, optimizer, change=lambda net, losses: None, steps=4, **options):
    """Parameters, G and w after some steps; the batches and draws are always the same."""
    random.seed(3)
    torch.manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = net(torch.randn(5, 6))
        change(net, losses)
        optimizer.pc_backward(losses, **options)
        optimizer.step()
    report = optimizer.report
    return [*(p.detach().clone() for p in net.parameters()), report.gram, report.weights], report.tasks


def both(monkeypatch, runs, variant="pytorch-pcgrad", heads=False, make=None, **options):
    """The same training this way and the way of all others, equal to the bit; the small rounds of the first."""
    results = []
    for largest in (small_round.LARGEST, 0):
        monkeypatch.setattr(small_round, "LARGEST", largest)
        net = Trunk(heads)
        optimizer = fastpcgrad.PCGrad(torch.optim.Adam(net.parameters()), variant=variant)
        change = make() if make else lambda net, losses: None
        results.append(trained(net, optimizer, change, **options))
        if largest:
            found = list(runs)
    assert runs == found, "a round of the other kind was one of this kind"
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    return found


@pytest.mark.parametrize("variant", PLAIN)
def test_the_bits_are_those_of_all_other_rounds(monkeypatch, runs, variant):
    found = both(monkeypatch, runs, variant)
    assert len(found) == 3 and all(found), "all but the first, which finds out what the layout is"


@pytest.mark.parametrize("variant", PLAIN)
def test_gaps_are_left_to_the_other_rounds(monkeypatch, runs, variant):
    assert both(monkeypatch, runs, variant, heads=True) == [None] * 3


def absent():
    def change(net, losses):
        losses[1] = None

    return change


def held():
    """Somebody keeps a task's gradient, or memory that it shares, so that a merge must not write there."""
    kept = []

    def change(net, losses):
        weight = net.trunk[2].weight
        weight.register_post_accumulate_grad_hook(lambda p: kept.append(p.grad.view(-1)[1:]))

    return change


def expanded():
    """Of a sum the gradient is a number that is expanded: no memory of its own."""

    def change(net, losses):
        losses[2] = losses[2] + net.trunk[0].weight.sum()

    return change


def of_one_task_alone():
    def change(net, losses):
        losses[1] = losses[1] + 0 * net.heads[0].bias.sum()
        losses[0] = net.trunk[0].bias.square().sum()

    return change


@pytest.mark.parametrize("make", [absent, held, expanded, of_one_task_alone], ids=lambda make: make.__name__)
def test_less_plain_rounds_give_the_same(monkeypatch, runs, make):
    assert len(both(monkeypatch, runs, make=make)) == 3


def test_what_somebody_holds_is_not_written():
    net = Trunk(heads=False)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    kept, copies = [], []

    def keep(parameter):
        kept.append(parameter.grad)
        copies.append(parameter.grad.clone())

    for _ in range(3):
        optimizer.zero_grad()
        losses = net(torch.randn(5, 6))
        handle = net.trunk[0].weight.register_post_accumulate_grad_hook(keep)
        optimizer.pc_backward(losses)
        handle.remove()
    assert len(kept) == 3 * TASKS
    assert all(torch.equal(own, other) for own, other in zip(kept, copies, strict=True))


def test_the_last_row_is_read_whoever_holds_it(runs):
    net, other = Trunk(heads=False), Trunk(heads=False)
    passes, kept = [], []

    def keep_the_last(parameter):
        passes.append(parameter.grad.clone())
        if len(passes) % TASKS == 0:
            kept.append((parameter.grad, passes[-1]))

    net.trunk[0].weight.register_post_accumulate_grad_hook(keep_the_last)
    nets = [net, other]
    found = [trained(n, fastpcgrad.PCGrad(torch.optim.SGD(n.parameters(), lr=0.1))) for n in nets]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert len(kept) == 4 and all(torch.equal(own, before) for own, before in kept)
    assert len(runs) == 6 and all(runs)


@pytest.mark.parametrize("of_every_round", [False, True])
def test_a_hook_that_writes_to_the_gradient_of_a_loss_counts_for_that_pass_alone(monkeypatch, runs, of_every_round):
    rounds = []

    def make():
        rounds.clear()

        def change(net, losses):
            rounds.append(len(losses))
            if of_every_round or len(rounds) == 3:
                losses[0].register_hook(lambda grad: grad.mul_(-3) and None)

        return change

    assert all(both(monkeypatch, runs, make=make))


def raising(net, losses):
    losses[2].register_hook(lambda grad: 1 / 0)


@pytest.mark.parametrize("set_aside", [False, True])
def test_a_backward_pass_that_fails_leaves_grad_as_it_was_and_the_next_round_is_right(runs, set_aside):
    net, other = Trunk(heads=False), Trunk(heads=False)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), variant="tensorflow")
    trained(net, optimizer, steps=2)
    other.load_state_dict(net.state_dict())
    optimizer.zero_grad()
    there = torch.ones_like(net.trunk[0].weight)
    net.trunk[0].weight.grad = there if set_aside else None
    losses = net(torch.randn(5, 6))
    raising(net, losses)
    with pytest.raises(ZeroDivisionError):
        optimizer.pc_backward(losses)
    assert net.trunk[0].weight.grad is (there if set_aside else None)
    assert all(p.grad is None for p in [*net.parameters()][1:])
    x = torch.randn(5, 6)
    for model in (net, other):
        model.zero_grad()
    optimizer.pc_backward(net(x))
    fastpcgrad.PCGrad(torch.optim.SGD(other.parameters(), lr=0.1), variant="tensorflow").pc_backward(other(x))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert runs[-1] is not None


def test_a_graph_that_was_freed_is_explained(runs):
    net = Trunk(heads=False)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    trained(net, optimizer, steps=2)
    losses = net(torch.randn(5, 6))
    for retain in (True, False):
        optimizer.pc_backward(losses, retain_graph=retain)
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        optimizer.pc_backward(losses)
    assert len(runs) == 3


@pytest.mark.parametrize("way", ["frozen", "another", "method", "rows", "copy"])
def test_what_changes_between_rounds_is_seen(runs, way):
    net = Trunk(heads=False)
    surgery = fastpcgrad.GradientSurgery(torch.optim.SGD(net.parameters(), lr=0.1), TASKS, methods.PCGrad("tensorflow"))
    for _ in range(2):
        surgery.backward(net(torch.randn(5, 6)))
    assert len(runs) == 1
    parameters = list(net.parameters())
    if way == "frozen":
        parameters[0].requires_grad_(False)
        parameters[0].grad = None
    elif way == "another":
        surgery.method = methods.MGDA()
    elif way == "method":
        surgery.method = methods.PCGrad("torchjd", generator=torch.Generator().manual_seed(0))
    elif way == "rows":
        surgery.rows = "factored"
    else:
        net, surgery = copy.deepcopy((net, surgery))
        parameters = list(net.parameters())
    losses = net(torch.randn(5, 6))
    trainable = [p for p in parameters if p.requires_grad]
    rows = [torch.autograd.grad(loss, trainable, retain_graph=True) for loss in losses]
    report = surgery.backward(losses)
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    merged = torch.cat([p.grad.flatten() for p in trainable]).double()
    torch.testing.assert_close(merged, report.weights @ j, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(report.gram, j @ j.T, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in parameters if not p.requires_grad)
    assert len(runs) == (2 if way == "method" else 1)


@pytest.mark.parametrize("kind", ["shape", "dtype", "no grad", "absent", "number", "fewer", "dict"])
def test_losses_that_look_otherwise_are_checked_anew(runs, kind):
    net = Trunk(heads=False)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), variant="tensorflow")
    trained(net, optimizer, steps=3)
    assert len(runs) == 2
    losses = net(torch.randn(5, 6))
    before = [p.grad for p in net.parameters()]
    refused = {
        "shape": (ValueError, torch.stack([losses[0], losses[0]])),
        "no grad": (ValueError, losses[0].detach()),
        "number": (TypeError, 1.0),
    }
    if kind in refused:
        error, losses[1] = refused[kind]
        with pytest.raises(error, match=r"losses\[1\]"):
            optimizer.pc_backward(losses)
        assert all(p.grad is grad for p, grad in zip(net.parameters(), before, strict=True))
        return
    rows = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in losses]
    tasks = {"fewer": (0, 1), "absent": (0, 2)}.get(kind, (0, 1, 2))
    given = {
        "dtype": lambda: [losses[0].double(), *losses[1:]],
        "absent": lambda: [losses[0], None, losses[2]],
        "fewer": lambda: losses[:2],
        "dict": lambda: dict(enumerate(losses)),
    }
    optimizer.zero_grad()
    if kind == "dict":  # of tasks without names
        with pytest.raises(TypeError):
            optimizer.pc_backward({"left": losses[0]})
    optimizer.pc_backward(given[kind]())
    assert tuple(optimizer.report.tasks) == tasks
    j = torch.stack([torch.cat([g.flatten() for g in rows[t]]) for t in tasks]).double()
    merged = torch.cat([p.grad.flatten() for p in net.parameters()]).double()
    torch.testing.assert_close(merged, optimizer.report.weights @ j, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["dtype", "shape", "another", "unfrozen", "group"])
def test_parameters_that_change_between_rounds_are_seen_by_the_drop_in(runs, way):
    net = Trunk(heads=False)
    frozen = net.trunk[0].bias.requires_grad_(way != "unfrozen")
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), variant="tensorflow")
    trained(net, optimizer, steps=3)
    assert len(runs) == 2
    x = torch.randn(5, 6)
    if way == "dtype":
        net, x = net.double(), x.double()
    elif way == "shape":  # as many elements as before
        net.trunk[2].weight.data = torch.randn(16, 8)
        net.trunk[2].bias.data, net.heads[0].weight.data = torch.randn(16), torch.randn(1, 16)
        net.trunk[0].weight.data, net.trunk[0].bias.data = torch.randn(8, 6), torch.randn(8)
    elif way == "another":
        net.trunk[2].weight = nn.Parameter(torch.randn(8, 16))
        optimizer.param_groups[0]["params"][2] = net.trunk[2].weight
    elif way == "unfrozen":
        frozen.requires_grad_(True)
    else:
        extra = nn.Parameter(torch.zeros(()))
        optimizer.add_param_group({"params": [extra]})
    optimizer.zero_grad()
    parameters, losses = list(net.parameters()), net(x)
    if way == "group":
        parameters, losses = [*parameters, extra], [loss + extra for loss in losses]
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    optimizer.pc_backward(losses)
    assert not any(runs[2:]), "a layout that is new is not one of a small round yet"
    assert optimizer.report.rows == SMALL
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    merged = torch.cat([p.grad.flatten() for p in parameters]).double()
    torch.testing.assert_close(merged, optimizer.report.weights @ j, rtol=1e-5, atol=1e-6)
    assert all(p.grad.dtype == p.dtype for p in parameters)


def test_rows_that_wait_for_a_merge_are_in_no_small_round(runs):
    net = Trunk(heads=False)
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.PCGrad("tensorflow"))
    for _ in range(2):
        surgery.backward(net(torch.randn(5, 6)))
    with surgery.task(0):
        net(torch.randn(5, 6))[0].backward()
    with pytest.raises(RuntimeError, match="filled"):
        surgery.backward(net(torch.randn(5, 6)))
    surgery.discard()
    surgery.backward(net(torch.randn(5, 6)))
    assert len(runs) == 2 and all(runs)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), variant="tensorflow")
    trained(net, optimizer, steps=2)
    with optimizer._surgery.task(0):
        net(torch.randn(5, 6))[0].backward()
    optimizer.pc_backward(net(torch.randn(5, 6)))
    with pytest.raises(RuntimeError, match="no task"):
        optimizer._surgery.merge()


def test_gradients_that_no_step_has_used_are_noticed(runs):
    net = Trunk(heads=False)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), variant="tensorflow")
    trained(net, optimizer, steps=3)
    optimizer.pc_backward(net(torch.randn(5, 6)))
    with pytest.warns(fastpcgrad.FastPCGradWarning, match="replaced"):
        optimizer.pc_backward(net(torch.randn(5, 6)))
    assert len(runs) == 4 and all(runs)
