"""Task gradients as factors: hooks that no graph shows, hidden backward passes, graphs that are kept or freed."""

import pytest
import torch
import torch._functorch.config  # not imported with torch
import torch._inductor.config
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpcgrad
from fastpcgrad import methods
from tests.factors.setting import TASKS, Hidden, assert_merged, losses_of_heads, rows_of, surgery_of, trunk_and_heads


class TestHooksOutOfSight:
    """What is registered after a graph's first step is seen in the next."""

    @pytest.fixture
    def run(self):
        self.net, self.x = trunk_and_heads()
        self.first = self.net[0][0]
        parameters = list(self.net.parameters())
        surgery = surgery_of(parameters)

        def run():
            rows = rows_of(losses_of_heads(self.net, self.x), parameters)
            report = surgery.backward(losses_of_heads(self.net, self.x))
            assert_merged(parameters, rows, report)
            return report.rows

        assert run().factored == run().factored == 2 + TASKS
        return run

    @staticmethod
    def after(module, register):
        def hook(_module, _inputs, output):
            register(output)

        module.register_forward_hook(hook)

    def test_on_the_weight(self, run):
        handle = self.first.weight.register_hook(lambda grad: 2 * grad)
        assert run().dense["a hook on the weight"] == 1
        handle.remove()
        assert run().factored == 2 + TASKS

    def test_on_a_view_of_the_weight(self, run):
        def forward(x):
            view = self.first.weight.t()
            view.register_hook(lambda grad: 2 * grad)
            return torch.addmm(self.first.bias, x, view)

        self.first.forward = forward
        for _ in range(2):
            assert run().dense["factors give another gradient than autograd does"] == 1

    def test_that_is_registered_anew_and_changes_the_gradient_of_one_task_alone(self):
        torch.manual_seed(0)
        weight, x = nn.Parameter(torch.randn(8, 8)), torch.randn(3, 8)
        surgery = surgery_of([weight])

        def losses():
            view = weight.t()
            view.register_hook(lambda grad: grad.clamp(-1, 1))
            h = x @ view
            return [1e-3 * h.square().mean(), h.sum(), 1e3 * h.square().sum()]

        for _ in range(3):
            rows = rows_of(losses(), [weight])
            report = surgery.backward(losses())
            assert report.rows.dense == {"factors give another gradient than autograd does": 1}
            assert_merged([weight], rows, report)
        found = fastpcgrad.grad(losses(), weight, method=methods.Sum(), rows="factored")[0]
        torch.testing.assert_close(found.flatten().double(), rows.sum(dim=0))

    def test_on_the_node_that_accumulates(self, run):
        node = self.first.weight.expand_as(self.first.weight).grad_fn.next_functions[0][0]
        calls = []
        handle = node.register_hook(lambda *_: calls.append(1))
        for _ in range(2):
            calls.clear()
            assert run().dense["a hook between the weight and its products"] == 1
            assert len(calls) == TASKS
        handle.remove()

    def test_on_the_product(self, run):
        calls = []
        self.after(self.first, lambda out: out.grad_fn.register_hook(lambda *_: calls.append(1)))
        assert run().dense["a hook between the weight and its products"] == 1
        assert len(calls) == 2 * TASKS  # those of the oracle, and ours

    def test_that_leaves_the_gradient_alone_runs_as_often_as_ever(self, run):
        calls = []
        self.after(self.net[0][1], lambda out: out.register_hook(lambda grad: calls.append(1)))
        assert run().factored == 2 + TASKS
        assert len(calls) == 2 * TASKS


@pytest.mark.parametrize("from_the_first_step", [True, False])
def test_a_hidden_backward_pass_to_a_factored_weight(from_the_first_step):
    net, x = trunk_and_heads(dtype=torch.float64)
    twin, _ = trunk_and_heads(dtype=torch.float64)
    hides = from_the_first_step

    def losses(net):
        h = net[0](x)
        h = Hidden.apply(h, net[0]) if hides else h
        return [head(h).square().mean() for head in net[1]]

    surgery, dense = surgery_of(net.parameters()), surgery_of(twin.parameters(), rows="dense")
    for step in range(3):
        report, expected = surgery.backward(losses(net)), dense.backward(losses(twin))
        torch.testing.assert_close(report.gram, expected.gram, rtol=1e-10, atol=1e-12)
        for own, other in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12)
        hides = hides or step == 0
    assert report.rows.factored == TASKS


def test_a_reentrant_checkpoint_is_dense():
    net, x = trunk_and_heads()
    h = checkpoint(net[0], x.requires_grad_(), use_reentrant=True)
    report = surgery_of(net.parameters()).backward([head(h).square().mean() for head in net[1]])
    assert report.rows.dense == {"a reentrant checkpoint hides what lies behind it": 10}
    assert net[0][0].weight.grad is not None


def test_a_compiled_trunk_is_dense():
    net, x = trunk_and_heads()
    parameters = list(net.parameters())
    # Where inductor was imported before, its cache of graphs has to be off, too.
    with torch._functorch.config.patch(donated_buffer=False), torch._inductor.config.patch(fx_graph_cache=False):
        compiled = torch.compile(net[0], backend="aot_eager")
        h = compiled(x)
        losses = [head(h).square().mean() for head in net[1]]
        rows = rows_of(losses, parameters)
        report = surgery_of(parameters).backward(losses)
    assert report.rows.factored == TASKS
    assert_merged(parameters, rows, report)


class TestGraphs:
    def test_are_freed_by_the_last_pass(self):
        net, x = trunk_and_heads()
        surgery = surgery_of(net.parameters())
        for _ in range(2):
            losses = losses_of_heads(net, x)
            surgery.backward(losses)
            with pytest.raises(RuntimeError, match="a second time"):
                surgery.backward(losses)

    def test_may_be_kept(self):
        net, x = trunk_and_heads()
        surgery = surgery_of(net.parameters())
        losses = losses_of_heads(net, x)
        first = surgery.backward(losses, retain_graph=True)
        assert torch.equal(surgery.backward(losses).gram, first.gram)

    def test_with_an_activation_that_changed_raise(self):
        net, x = trunk_and_heads()
        before = [p.grad for p in net.parameters()]
        h = net[0][0](x)
        losses = [head(net[0][1:](h)).square().mean() for head in net[1]]
        with torch.no_grad():
            x.add_(1)
        surgery = surgery_of(net.parameters())
        with pytest.raises(RuntimeError, match="inplace operation"):
            surgery.backward(losses)
        assert [p.grad for p in net.parameters()] == before
        assert surgery.backward(losses_of_heads(net, x)).rows.factored == 2 + TASKS

    def test_of_a_pass_that_failed_have_no_hooks_left(self):
        net, x = trunk_and_heads()
        losses = losses_of_heads(net, x)
        broken = losses[1] * 1
        broken.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            surgery_of(net.parameters()).backward([losses[0], broken, losses[2]], retain_graph=True)
        node = losses[0].grad_fn
        while node.name() != "AddmmBackward0":
            node = node.next_functions[0][0]
        handle = node.register_prehook(lambda grads: None)
        assert len(handle.hooks_dict_ref()) == 1


class TestFunctional:
    """``grad`` and ``backward``, which touch no ``.grad`` until they add to it."""

    def test_equal_those_with_dense_rows(self):
        net, x = trunk_and_heads(dtype=torch.float64)
        inputs = list(net.parameters())
        results = []
        for rows in ("dense", "factored", "factored"):
            torch.manual_seed(0)
            results.append(fastpcgrad.grad(losses_of_heads(net, x), inputs, rows=rows))
            assert all(p.grad is None for p in inputs)
        for dense, first, second in zip(*results, strict=True):
            torch.testing.assert_close(first, dense, rtol=1e-10, atol=1e-12)
            assert torch.equal(second, first)
        torch.manual_seed(0)
        fastpcgrad.backward(losses_of_heads(net, x), rows="factored")
        for p, own in zip(inputs, results[2], strict=True):
            torch.testing.assert_close(p.grad, own, rtol=1e-10, atol=1e-12)

    def test_hooks_on_the_output_of_a_product_that_need_not_run(self):
        torch.manual_seed(0)
        layer = nn.Linear(8, 8, bias=False)
        x = torch.randn(3, 8)

        def losses():
            h = layer(x)
            h.register_hook(lambda grad: grad * 10)
            return [(h - t).square().mean() for t in range(TASKS)]

        for _ in range(2):
            (dense,) = fastpcgrad.grad(losses(), layer.weight, method=methods.Mean(), rows="dense")
            (found,) = fastpcgrad.grad(losses(), layer.weight, method=methods.Mean(), rows="factored")
            torch.testing.assert_close(found, dense)
