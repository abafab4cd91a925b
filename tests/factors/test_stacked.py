"""One pass for all tasks through their trunk: when it is made, and that it gives what one pass a task gives."""

import pytest
import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.rows import hooks, stacked
from tests import random_graphs
from tests.factors.setting import TASKS, Hidden, assert_merged, losses_of_heads, rows_of, surgery_of, trunk_and_heads
from tests.test_random_graphs import check, drawn
from tests.without_private_names import load

FIRST = "the first two steps of the graph, or since somebody has registered a hook"
OTHER = "a hook on a leaf, an activation that retains its gradient, or stacked gradients that were others"
KINDS = [
    "Piece",
    "NoBias",
    "Flat",
    "Residual",
    "LayerNorm",
    "BatchNorm",
    "Reused",
    "LowRank",
    "Cell",
    "AsItIs",
    "LookedUp",
    "Bags",
]


@pytest.fixture(autouse=True)
def _pays(monkeypatch):
    monkeypatch.setattr(stacked, "stacking_pays", lambda *_: True)
    torch.ones(1, requires_grad=True).register_hook(print)  # from here on, a graph's first step is one after a hook


def step(surgery, net, losses=None, tolerance=1e-6):
    """One step, its gradient compared with autograd's rows; gives why there was a pass for each task."""
    parameters = list(net.parameters())
    losses = losses or losses_of_heads
    rows = rows_of(losses(), parameters) if callable(losses) else None
    report = surgery.backward(losses())
    assert_merged(parameters, rows, report, tolerance)
    assert report.rows.stacked == (report.rows.loop is None)
    return report.rows.loop


def setting(**options):
    net, x = trunk_and_heads(**options)
    return surgery_of(net.parameters()), net, lambda: losses_of_heads(net, x)


def test_the_first_step_of_a_graph_is_looped_and_further_ones_stacked():
    surgery, net, losses = setting()
    assert [step(surgery, net, losses) for _ in range(3)] == [FIRST, FIRST, None]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_trunks(kind):
    kinds = [random_graphs.Flat, getattr(random_graphs, kind), random_graphs.Flat]
    seed = next(seed for seed in range(99) if (m := drawn(seed, TASKS, kinds)).is_above and set(m.depths) == {3})
    model, twin = (drawn(seed, TASKS, kinds) for _ in range(2))
    reports = check(model, twin, torch.randn(model.shape, dtype=torch.float64), TASKS)
    assert [report.rows.loop for report in reports] == [FIRST, FIRST, None, None]


@pytest.mark.parametrize("name", ["hooks_registered", "nodes_made"])
def test_a_torch_that_counts_neither_hooks_nor_nodes_is_never_stacked(name, monkeypatch):
    monkeypatch.setattr(hooks, name, getattr(load(), name))
    surgery, net, losses = setting()
    assert [step(surgery, net, losses) for _ in range(4)] == [FIRST] * 4


def test_a_scaled_bias():
    surgery, net, _ = setting()
    first, x = net[0][0], torch.randn(5, 16)

    def losses():
        h = net[0][1:](torch.addmm(first.bias, x, first.weight.t(), beta=0.5))
        return [head(h).square().mean() for head in net[1]]

    assert [step(surgery, net, losses) for _ in range(3)] == [FIRST, FIRST, None]


def test_dropout_has_the_masks_of_the_forward_pass():
    surgery, net, _ = setting()
    net[0].insert(2, nn.Dropout(0.5))
    x = torch.randn(5, 16)

    def losses():
        torch.manual_seed(7)
        return losses_of_heads(net, x)

    assert [step(surgery, net, losses) for _ in range(3)] == [FIRST, FIRST, None]


def test_autocast():
    surgery, net, losses = setting()

    def rounded():
        with torch.autocast("cpu", torch.bfloat16):
            return losses()

    assert [step(surgery, net, rounded, 4e-3) for _ in range(3)] == [FIRST, FIRST, None]


def test_absent_tasks():
    surgery, net, losses = setting()
    for expected in (FIRST, FIRST, None):
        present = losses()
        report = surgery.backward([present[0], None, present[2]])
        assert report.rows.loop == expected
        parameters = [*net[0].parameters(), *net[1][0].parameters(), *net[1][2].parameters()]
        assert_merged(parameters, rows_of([losses()[t] for t in (0, 2)], parameters), report)
        assert net[1][1].weight.grad is None


@pytest.mark.parametrize("shape", [(), (3,), (5, 3)])
def test_a_complex_parameter_of_a_head(shape):
    """Whose gradient a row has as real and imaginary parts."""
    net, x = trunk_and_heads()
    factor = nn.Parameter(torch.randn(shape, dtype=torch.complex64))
    parameters = [*net.parameters(), factor]
    surgery, dense = surgery_of(parameters), surgery_of(parameters, rows="dense")

    def losses():
        h = net[0](x)
        *others, last = (head(h) for head in net[1])
        return [*(out.square().mean() for out in others), (factor * last).abs().square().mean()]

    for expected in (FIRST, FIRST, None, None):
        report = surgery.backward(losses())
        assert report.rows.loop == expected
        merged = factor.grad
        torch.testing.assert_close(report.gram, dense.backward(losses()).gram)
        torch.testing.assert_close(merged, factor.grad)


def test_a_loss_whose_gradient_is_zero():
    surgery, net, losses = setting()

    def one_is_zero():
        found = losses()
        return [found[0], found[1] * 0, found[2]]

    assert [step(surgery, net, one_is_zero) for _ in range(3)] == [FIRST, FIRST, None]


class TestHooks:
    def test_on_an_activation(self):
        surgery, net, losses = setting()
        assert [step(surgery, net, losses) for _ in range(3)] == [FIRST, FIRST, None]

        def hook(_module, _inputs, output):
            output.register_hook(lambda grad: grad * 10)

        handle = net[0][1].register_forward_hook(hook)
        assert [step(surgery, net, losses) for _ in range(2)] == [FIRST, FIRST]
        handle.remove()
        assert [step(surgery, net, losses) for _ in range(2)] == [FIRST, None]

    def test_on_an_activation_of_a_graph_that_was_there_before(self):
        surgery, net, _ = setting()
        x = torch.randn(5, 16)

        def hooked():
            h = net[0][0](x)
            h.register_hook(lambda grad: grad * 10)
            h = net[0][1:](h)
            return [head(h).square().mean() for head in net[1]]

        first, second, rows = hooked(), hooked(), rows_of(hooked(), list(net.parameters()))
        for graph in (first, second):
            report = surgery.backward(graph)
            assert_merged(list(net.parameters()), rows, report)
        assert report.rows.loop == FIRST

    def test_on_an_activation_of_a_graph_that_is_older_than_those_that_were_stacked(self):
        surgery, net, losses = setting()
        h = net[0][0](torch.randn(5, 16))
        trunk = net[0][1:](h)
        older = [(head(trunk) - t).square().mean() for t, head in enumerate(net[1])]
        h.register_hook(lambda grad: grad * 10)
        assert [step(surgery, net, losses) for _ in range(3)] == [FIRST, FIRST, None]
        self.assert_looped(surgery, net, older)

    def test_on_an_activation_below_the_products(self):
        """Which are younger than the hook."""
        _, net, _ = setting()
        scale = nn.Parameter(torch.rand(16))
        net = nn.ModuleList([*net, nn.ParameterList([scale])])
        surgery, x = surgery_of(net.parameters()), torch.randn(5, 16)
        h = x * scale
        h.register_hook(lambda grad: grad * 10)
        assert [step(surgery, net, lambda: losses_of_heads(net, x * scale)) for _ in range(3)] == [FIRST, FIRST, None]
        self.assert_looped(surgery, net, losses_of_heads(net, h))

    def assert_looped(self, surgery, net, older):
        parameters = list(net.parameters())
        rows = rows_of(older, parameters)
        report = surgery.backward(older)
        assert report.rows.loop == "the graph is older than the last hook that somebody has registered"
        assert_merged(parameters, rows, report)

    @pytest.mark.parametrize("where", ["trunk", "head"])
    def test_on_the_node_of_a_leaf(self, where):
        surgery, net, losses = setting()
        bias = net[0][0].bias if where == "trunk" else net[1][0].bias
        node = bias.expand_as(bias).grad_fn.next_functions[0][0]
        calls = []
        handle = node.register_hook(lambda *_: calls.append(1))
        for _ in range(3):
            calls.clear()
            surgery.backward(losses())
            assert len(calls) == (TASKS if where == "trunk" else 1)
        handle.remove()

    @pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
    @pytest.mark.parametrize("where", ["trunk", "head"])
    def test_on_a_leaf(self, where, register):
        surgery, net, losses = setting()
        bias = net[0][0].bias if where == "trunk" else net[1][0].bias
        getattr(bias, register)(lambda given: 3 * given if register == "register_hook" else None)
        assert [step(surgery, net, losses) for _ in range(3)] == ["a hook on a leaf"] * 3

    @pytest.mark.parametrize("where", [0, 1, 3])
    def test_an_activation_that_retains_its_gradient(self, where):
        surgery, net, _ = setting()
        x = torch.randn(5, 16)
        for _ in range(4):
            kept = []
            for rows in ("dense", "factored"):
                surgery = surgery_of(net.parameters(), rows=rows)
                before = net[0][: where + 1](x)
                before.retain_grad()
                h = net[0][where + 1 :](before)
                report = surgery.backward([head(h).square().mean() for head in net[1]])
                kept.append(before.grad)
            torch.testing.assert_close(*kept)
        assert not report.rows.stacked


@pytest.mark.parametrize("where", ["trunk", "head"])
def test_a_hidden_backward_pass(where):
    """Whose gradients arrive in ``.grad`` and nowhere else."""
    hidden = nn.Linear(16, 16)
    net, x = trunk_and_heads()
    parameters = [*net.parameters(), *hidden.parameters()]
    results = []
    for rows in ("dense", "factored"):
        surgery = surgery_of(parameters, rows=rows)
        for _ in range(4):
            h = net[0](x)
            h = Hidden.apply(h, hidden) if where == "trunk" else h
            losses = [head(h).square().mean() for head in net[1]]
            losses[0] = losses[0] + Hidden.apply(h, hidden).square().mean()
            report = surgery.backward(losses)
        results.append([p.grad for p in parameters])
    assert report.rows.loop is not None
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other)


def test_leaves_outside_of_the_surgery_accumulate():
    _, net, _ = setting()
    surgery = surgery_of([*net[0].parameters(), *net[1][0].parameters()])
    x = torch.randn(5, 16)
    for expected in (FIRST, FIRST, None):
        before = net[1][1].weight.grad
        (wanted,) = torch.autograd.grad(losses_of_heads(net, x)[1], net[1][1].weight)
        wanted = wanted if before is None else wanted + before
        assert surgery.backward(losses_of_heads(net, x)).rows.loop == expected
        torch.testing.assert_close(net[1][1].weight.grad, wanted)


@pytest.mark.parametrize("wrong", ["products", "leaves"])
def test_stacked_gradients_that_are_others_are_not_taken(wrong, monkeypatch):
    run = stacked.Trunk.run

    def run_wrong(self, seeds):
        deltas, leaves = run(self, seeds)
        chosen = deltas if wrong == "products" else leaves
        node = next(iter(chosen))
        chosen[node] = chosen[node] * 1.001
        return deltas, leaves

    monkeypatch.setattr(stacked.Trunk, "run", run_wrong)
    surgery, net, losses = setting()
    assert [step(surgery, net, losses) for _ in range(3)] == [FIRST, FIRST, OTHER]


def test_the_graph_is_kept_or_freed_as_ever():
    surgery, net, losses = setting()
    for _ in range(2):
        step(surgery, net, losses)
    graph = losses()
    first = surgery.backward(graph, retain_graph=True)
    assert first.rows.stacked
    assert torch.equal(surgery.backward(graph).gram, first.gram)
    with pytest.raises(RuntimeError, match="a second time"):
        surgery.backward(graph)


def test_many_rows_are_looped(monkeypatch):
    monkeypatch.undo()
    surgery, net, losses = setting(width=64)
    assert [step(surgery, net, losses) for _ in range(3)] == [FIRST, FIRST, None]
    surgery, net, losses = setting(width=64, rows=65)
    assert [step(surgery, net, losses) for _ in range(2)] == ["stacking would not pay"] * 2


def test_the_drop_in_makes_the_same_steps():
    results = []
    for rows in ("dense", "factored"):
        net, x = trunk_and_heads(dtype=torch.float64)
        optimizer = fastpcgrad.PCGrad(
            torch.optim.Adam(net.parameters()), method=methods.PCGrad("tensorflow"), rows=rows
        )
        for _ in range(5):
            optimizer.zero_grad()
            optimizer.pc_backward(losses_of_heads(net, x))
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert optimizer.report.rows.stacked
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
