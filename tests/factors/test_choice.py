"""Which task gradients are kept as factors, and how that is switched off."""

import pytest
import torch

import fastpcgrad
from fastpcgrad.rows import choice, factors
from fastpcgrad.rows.task_gradients import TaskGradients
from tests.factors.setting import TASKS, assert_merged, losses_of_heads, rows_of, surgery_of, trunk_and_heads


class TestChoice:
    @pytest.fixture
    def net_and_losses(self, monkeypatch):
        for module in (choice, factors):
            monkeypatch.setattr(module, "LEAST_ELEMENTS", 1000)
        net, x = trunk_and_heads(width=64, rows=8)
        return net, lambda: losses_of_heads(net, x)

    def factored(self, net, losses, **options):
        """In a second step: the first one's graph may be hooked."""
        surgery = surgery_of(net.parameters(), **options)
        surgery.backward(losses())
        return surgery.backward(losses()).rows.factored

    def test_hooks_in_every_step_end_it_unless_factors_are_asked_for(self, net_and_losses):
        net, losses = net_and_losses
        reason = "hooks are registered in every step, after the graph was begun"
        surgery, asked = (surgery_of(net.parameters(), rows=rows) for rows in ("auto", "factored"))

        def hooked():
            graph = losses()
            graph[0].register_hook(lambda grad: None)
            return graph

        assert [surgery.backward(hooked()).rows.factored for _ in range(2)] == [2, 2]
        assert [surgery.backward(hooked()).rows.dense[reason] for _ in range(2)] == [2, 2]
        assert asked.backward(hooked()).rows.factored == 2 + TASKS
        assert surgery.backward(losses()).rows.factored == 2
        assert surgery.backward(hooked()).rows.factored == 2

    def test_the_first_step_compares_every_gradient(self, net_and_losses):
        net, losses = net_and_losses
        hidden = net[0][0].weight

        def forward(x):
            view = hidden.t()
            view.register_hook(lambda grad: 2 * grad)
            return torch.addmm(net[0][0].bias, x, view)

        net[0][0].forward = forward
        rows = rows_of(losses(), list(net.parameters()))
        report = surgery_of(net.parameters(), rows="auto").backward(losses())
        assert report.rows.dense["factors give another gradient than autograd does"] == 1
        assert_merged(list(net.parameters()), rows, report)

    def test_the_first_step_keeps_no_row_of_a_weight(self, net_and_losses, monkeypatch):
        net, losses = net_and_losses
        torch.ones(1, requires_grad=True).register_hook(print)  # from here on, a graph's first step is one after a hook
        kept, keep = [], TaskGradients.keep

        def noting(self, task, row):
            kept.append([grad is not None for grad in row])
            keep(self, task, row)

        monkeypatch.setattr(TaskGradients, "keep", noting)
        surgery_of(net.parameters(), rows="auto").backward(losses())
        assert len(kept) == TASKS
        for row in kept:
            assert row[:4] == [False, True, False, True]

    def test_auto_takes_factors_of_what_several_tasks_reach(self, net_and_losses):
        net, losses = net_and_losses
        assert self.factored(net, losses, rows="auto") == 2
        assert self.factored(net, losses, rows="factored") == 2 + TASKS
        assert self.factored(net, losses, rows="dense") == 0

    def test_many_rows_are_left_dense(self, net_and_losses):
        net, _ = net_and_losses
        many = torch.randn(40, 64)
        report = surgery_of(net.parameters(), rows="auto").backward(losses_of_heads(net, many))
        assert report.rows.factored == 0
        assert report.rows.dense["factors would not pay"] == 2 + TASKS

    def test_the_environment_and_the_context_switch_it_off(self, net_and_losses, monkeypatch):
        net, losses = net_and_losses
        with fastpcgrad.dense_rows():
            assert self.factored(net, losses) == 0
        assert self.factored(net, losses) == 2 + TASKS
        monkeypatch.setenv("FASTPCGRAD_ROWS", "dense")
        assert self.factored(net, losses) == 0
        monkeypatch.setenv("FASTPCGRAD_ROWS", "auto")
        assert self.factored(net, losses) == 2 + TASKS
        monkeypatch.setenv("FASTPCGRAD_ROWS", "sparse")
        with pytest.raises(ValueError, match="FASTPCGRAD_ROWS must be auto or dense; found 'sparse'"):
            losses_of = losses()
            surgery_of(net.parameters()).backward(losses_of)

    def test_the_drop_in_hands_it_on(self, net_and_losses):
        net, losses = net_and_losses
        for rows, count in (("auto", 2), ("dense", 0)):
            optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), rows=rows)
            for _ in range(2):
                optimizer.zero_grad()
                optimizer.pc_backward(losses())
            assert optimizer.report.rows.factored == count

    def test_small_models_are_not_looked_at(self, monkeypatch):
        net, x = trunk_and_heads()
        monkeypatch.setattr("fastpcgrad.surgery.planned", None)
        report = surgery_of(net.parameters(), rows="auto").backward(losses_of_heads(net, x))
        assert list(report.rows.dense) == ["the model's matrices have less than 1000000 elements"]

    def test_rows_of_another_dtype_are_dense(self):
        net, x = trunk_and_heads()
        report = surgery_of(net.parameters(), row_dtype=torch.bfloat16).backward(losses_of_heads(net, x))
        assert report.rows.dense == {"rows of another dtype or on another device": 10}

    def test_what_a_caller_ran_is_dense(self):
        net, x = trunk_and_heads()
        surgery = surgery_of(net.parameters())
        surgery.backward(losses_of_heads(net, x))
        for t in range(TASKS):
            with surgery.task(t):
                losses_of_heads(net, x)[t].backward()
        assert surgery.merge().rows.dense == {"backward passes that the surgery did not run": 1}

    @pytest.mark.parametrize("rows", ["sparse", None, 1])
    def test_another_choice_is_refused(self, rows):
        net, x = trunk_and_heads()
        message = f"rows must be 'auto', 'dense' or 'factored'; found {rows!r}"
        with pytest.raises(ValueError, match=message):
            surgery_of(net.parameters(), rows=rows)
        with pytest.raises(ValueError, match=message):
            fastpcgrad.grad(losses_of_heads(net, x), list(net.parameters()), rows=rows)
