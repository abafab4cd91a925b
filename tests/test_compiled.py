"""Compiled models whose losses share a graph: what torch refuses is refused with the remedy, and the remedy works."""

import pytest
import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods, reference

REMEDY = r"torch\._functorch\.config\.donated_buffer = False.*fx_graph_cache = False"


class Setting:
    """A compiled model whose backward pass was first run for a single use: it writes over what it has saved."""

    def __init__(self):
        torch._dynamo.reset()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        self.x = torch.randn(5, 4)
        self.parameters = list(self.model.parameters())
        self.compiled = torch.compile(self.model, backend="aot_eager")
        self.compiled(self.x).sum().backward()  # leaves a .grad, which no error may change

    def losses(self, model=None):
        left, right = (model or self.compiled)(self.x).square().mean(dim=0).unbind()
        return [left, -right]

    def expected(self):
        rows = [torch.autograd.grad(loss, self.parameters, retain_graph=True) for loss in self.losses(self.model)]
        return reference.merge(rows, self.parameters, "tensorflow")


@pytest.fixture
def setting():
    yield Setting()
    torch._dynamo.reset()


@pytest.fixture
def method():
    return methods.PCGrad("tensorflow")


def pc_backward(setting, method):
    fastpcgrad.PCGrad(torch.optim.SGD(setting.parameters), method=method).pc_backward(setting.losses())


def task(setting, method):
    surgery = fastpcgrad.GradientSurgery(setting.parameters, 2, method)
    with surgery.task(0):
        setting.losses()[0].backward(retain_graph=True)


def backward(setting, method):
    fastpcgrad.backward(setting.losses(), method=method)


def grad(setting, method):
    fastpcgrad.grad(setting.losses(), setting.parameters, method=method)


@pytest.mark.parametrize("call", [pc_backward, task, backward, grad])
def test_a_shared_graph_is_refused_with_the_remedy(setting, method, call):
    before = [(p.grad, p.grad.clone()) for p in setting.parameters]
    with pytest.raises(RuntimeError, match=REMEDY) as raised:
        call(setting, method)
    assert "donated buffer" in str(raised.value.__cause__)
    for p, (grad, values) in zip(setting.parameters, before, strict=True):
        assert p.grad is grad and torch.equal(grad, values)


def test_rows_that_were_there_stay_and_the_refused_task_is_absent(setting, method):
    surgery = fastpcgrad.GradientSurgery(setting.parameters, 2, method)
    with surgery.task(0):
        setting.losses()[0].backward()
    with pytest.raises(RuntimeError, match=REMEDY), surgery.task(1):
        setting.losses()[1].backward(retain_graph=True)
    with surgery.task(1):
        setting.losses()[1].backward()
    assert surgery.merge().tasks == (0, 1)
    for p, expected in zip(setting.parameters, setting.expected(), strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_another_error_of_a_backward_pass_comes_through_as_it_is(setting, method):
    losses = setting.losses()
    losses[0].backward()
    with pytest.raises(RuntimeError, match="second time"):
        fastpcgrad.grad(losses, setting.parameters, method=method)
