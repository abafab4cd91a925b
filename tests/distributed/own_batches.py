"""A small model, of whose batch each process has a part, and what its steps have to give."""

import contextlib
import warnings

import pytest
import torch
import torch._dynamo  # which FSDP would otherwise import in each rank
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastpcgrad
from fastpcgrad import FastPCGradWarning, _warnings, methods, reference
from fastpcgrad.distributed import processes

TASKS, BATCH = 3, 4


class Net(nn.Module):
    """A trunk and a head; the features pass through ``between``."""

    def __init__(self, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()).double()
        self.head = nn.Linear(4, TASKS).double()
        self.between = between

    def forward(self, x):
        z = self.trunk(x)
        if self.between is None:
            return self.head(z).unbind(dim=1)
        return [self.head(own)[:, t] for t, own in enumerate(self.between(z))]


def batch(ranks=None):
    """What this process sees, or with ``ranks`` all of theirs, one after the other."""
    parts = []
    for rank in range(dist.get_world_size()) if ranks is None else ranks:
        generator = torch.Generator().manual_seed(rank + 1)
        x = torch.randn(BATCH, 6, dtype=torch.float64, generator=generator)
        parts.append((x, 3 * torch.randn(BATCH, TASKS, dtype=torch.float64, generator=generator)))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def own_batch():
    return batch([dist.get_rank()])


def losses(model, x, y):
    return [(output - y[:, t]).square().mean() for t, output in enumerate(model(x))]


def rows(x, y):
    """The task gradients of the unwrapped model."""
    net = Net()
    return [
        list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True))
        for loss in losses(net, x, y)
    ]


def merged(x, y):
    return reference.merge(rows(x, y), list(Net().parameters()), "tensorflow")


def fixed_order():
    return methods.PCGrad("tensorflow")


def whole(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def assert_grads(parameters, expected):
    for p, right in zip(parameters, expected, strict=True):
        torch.testing.assert_close(whole(p.grad), right, rtol=1e-12, atol=1e-12)


def assert_ordinary_steps_are_right(model, parameters, data=None):
    """Twice, as what a step leaves behind shows in the next one: the mean over processes, as if nothing had been."""
    right = [sum(column) for column in zip(*rows(*batch()), strict=True)]
    for _ in range(2):
        for p in parameters:
            p.grad = None
        sum(losses(model, *(own_batch() if data is None else data))).backward()
        assert_grads(parameters, right)


def assert_refused(call, parameters, *words):
    """By an error with these words, before any gradient is there."""
    for p in parameters:
        p.grad = None
    with pytest.raises(NotImplementedError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert all(p.grad is None for p in parameters)


def doors(model, parameters, data, process_group="auto"):
    """Calls that take gradients of the model's graph, each with a graph of its own."""
    options = {"method": fixed_order(), "process_group": process_group}
    leaf = data[0].clone().requires_grad_()
    return {
        "backward": lambda: fastpcgrad.backward(losses(model, *data), **options),
        "backward with inputs": lambda: fastpcgrad.backward(losses(model, *data), parameters, **options),
        "grad": lambda: fastpcgrad.grad(losses(model, *data), parameters, **options),
        "grad of another leaf": lambda: fastpcgrad.grad(losses(model, leaf, data[1]), [leaf], **options),
        "grad of no leaf": lambda: grad_of_outputs(model, data, options),
    }


def rounds(model, parameters, data, process_group="auto"):
    """Calls of the objects that take rows from ``.grad``."""
    options = {"method": fixed_order(), "process_group": process_group}
    surgery = fastpcgrad.GradientSurgery(parameters, TASKS, **options)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(parameters, lr=0.1), **options)

    def functions():
        return [lambda t=t: losses(model, *data)[t] for t in range(TASKS)]

    return {
        "pc_backward": lambda: optimizer.pc_backward(losses(model, *data)),
        "surgery.backward": lambda: surgery.backward(losses(model, *data)),
        "surgery.backward of functions": lambda: surgery.backward(functions()),
        "two phases": lambda: surgery.backward(losses(model, *data), two_phase=True),
        "surgery.task": lambda: task_by_task(surgery, model, data),
    }


def task_by_task(surgery, model, data):
    for t in range(TASKS):
        with surgery.task(t):
            losses(model, *data)[t].backward()
    surgery.merge()


def grad_of_outputs(model, data, options):
    outputs = torch.stack(list(model(data[0])))
    fastpcgrad.grad([output.square().mean() * output.sum() for output in outputs.unbind()], [outputs], **options)


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastPCGradWarning)
        _warnings._said.clear()
        yield


@contextlib.contextmanager
def no_search():
    """Within, looking through all live objects is an error."""
    search = processes._holders
    processes._holders = None
    try:
        yield
    finally:
        processes._holders = search


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(reshard, layers=True):
    net = Net()
    if layers:
        fully_shard(net.trunk, mesh=mesh(), reshard_after_forward=reshard)
    return fully_shard(net, mesh=mesh(), reshard_after_forward=reshard)
