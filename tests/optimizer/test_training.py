"""PCGrad(optimizer) as a drop-in: what users of the original have."""

import random

import pytest
import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods, reference

from .models import Model, assert_grad, assert_merged, fixed, losses_of, task_gradients


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
