"""Compiled models whose losses share a graph: what torch refuses is refused with the remedy, and the remedy works."""

import shutil
from typing import ClassVar

import pytest
import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods, reference
from fastpcgrad._graph import run_backward

REMEDY = r"torch\._functorch\.config\.donated_buffer = False.*fx_graph_cache = False"


class Setting:
    """A compiled model whose backward pass was first run for a single use: it writes over what it has saved."""

    def __init__(self, backend="aot_eager"):
        torch._dynamo.reset()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        self.x = torch.randn(5, 4)
        self.parameters = list(self.model.parameters())
        self.compiled = torch.compile(self.model, backend=backend)
        self.compiled(self.x).sum().backward()  # leaves a .grad, which no error may change

    def losses(self, model=None):
        left, right = (model or self.compiled)(self.x).square().mean(dim=0).unbind()
        return [left, -right]

    def expected(self):
        rows = [torch.autograd.grad(loss, self.parameters, retain_graph=True) for loss in self.losses(self.model)]
        return reference.merge(rows, self.parameters, "tensorflow")

    def assert_merged(self):
        for p, expected in zip(self.parameters, self.expected(), strict=True):
            torch.testing.assert_close(p.grad, expected)


@pytest.fixture
def setting():
    yield Setting()
    torch._dynamo.reset()


@pytest.fixture
def method():
    return methods.PCGrad("tensorflow")


def snapshot(setting):
    return [(p.grad, p.grad.clone()) for p in setting.parameters]


def assert_unchanged(setting, before):
    for p, (grad, values) in zip(setting.parameters, before, strict=True):
        assert p.grad is grad and torch.equal(grad, values)


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


def in_two_phases(setting, method):
    fastpcgrad.GradientSurgery(setting.parameters, 2, method).backward(setting.losses(), two_phase=True)


@pytest.mark.parametrize("call", [pc_backward, task, backward, grad])
def test_a_shared_graph_is_refused_with_the_remedy(setting, method, call):
    before = snapshot(setting)
    with pytest.raises(RuntimeError, match=REMEDY) as raised:
        call(setting, method)
    assert "donated buffer" in str(raised.value.__cause__)
    assert all(
        p.grad is grad and torch.equal(grad, values)
        for p, (grad, values) in zip(setting.parameters, before, strict=True)
    )


def test_rows_that_were_there_stay_and_the_refused_task_is_absent(setting, method):
    surgery = fastpcgrad.GradientSurgery(setting.parameters, 2, method)
    with surgery.task(0):
        setting.losses()[0].backward()
    with pytest.raises(RuntimeError, match=REMEDY), surgery.task(1):
        setting.losses()[1].backward(retain_graph=True)
    with surgery.task(1):
        setting.losses()[1].backward()
    assert surgery.merge().tasks == (0, 1)
    setting.assert_merged()


def test_another_error_of_a_backward_pass_comes_through_as_it_is(setting, method):
    losses = setting.losses()
    losses[0].backward()
    with pytest.raises(RuntimeError, match="second time"):
        fastpcgrad.grad(losses, setting.parameters, method=method)


importing_inductor = pytest.mark.filterwarnings("ignore:.torch.jit")


@importing_inductor
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_the_remedy_works_and_half_of_it_is_refused(method):
    """Half of it is torch's own advice: with a cached backward pass it gives wrong gradients and no error."""
    import torch._functorch.config
    import torch._inductor.config

    with torch._functorch.config.patch(donated_buffer=False), torch._inductor.config.patch(compile_threads=1):
        with torch._inductor.config.patch(fx_graph_cache=False):
            setting = Setting("inductor")
            pc_backward(setting, method)
            setting.assert_merged()
        before = snapshot(setting)
        for call in (pc_backward, backward, grad, in_two_phases):
            with pytest.raises(RuntimeError, match=REMEDY):
                call(setting, method)
        assert all(
            p.grad is kept and torch.equal(kept, v) for p, (kept, v) in zip(setting.parameters, before, strict=True)
        )
        # A forward and a single backward pass for each task need no setting.
        surgery = fastpcgrad.GradientSurgery(setting.parameters, 2, method)
        for t in range(2):
            with surgery.task(t):
                setting.losses()[t].backward()
        surgery.merge()
        setting.assert_merged()
    torch._dynamo.reset()


@importing_inductor
def test_eager_models_are_none_of_its_concern(method):
    """The check looks at graphs alone: inductor may have compiled something else."""
    import torch._functorch.config
    import torch._inductor.compile_fx

    x = torch.ones(2, requires_grad=True)
    with torch._functorch.config.patch(donated_buffer=False):
        fastpcgrad.backward([x[0] - x[1], x[1]], method=method)
    torch.testing.assert_close(x.grad, torch.tensor([1.5, 0.5]))


class Overridden(torch.Tensor):
    """A tensor that wants to know of what is done with it."""

    called: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.called.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_running_backward_is_the_losses_own_backward(shape):
    weight = torch.randn(3, 4, requires_grad=True)
    seen = []
    weight.register_hook(seen.append)
    loss = (weight.square().sum() * weight[0, 0]).reshape(shape)
    loss.backward(retain_graph=True)
    expected, weight.grad = weight.grad, None
    run_backward(loss, retain_graph=True)
    run_backward(loss, retain_graph=False)
    torch.testing.assert_close(weight.grad, 2 * expected)
    assert len(seen) == 3
    with pytest.raises(RuntimeError, match="second time"):
        run_backward(loss, retain_graph=False)


def test_a_tensor_with_a_backward_of_its_own_is_asked():
    weight = torch.randn(3, requires_grad=True)
    loss = weight.square().sum().as_subclass(Overridden)
    Overridden.called.clear()
    run_backward(loss, retain_graph=False)
    assert torch.Tensor.backward in Overridden.called
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_a_function_transform_is_refused_as_torch_refuses_it():
    def inside(x):
        run_backward(x.square().sum(), retain_graph=False)
        return x.sum()

    with pytest.raises(RuntimeError, match="functorch transform"):
        torch.func.grad(inside)(torch.ones(2))
