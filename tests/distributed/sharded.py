"""Surgery of DTensors: three training steps on several processes are those of one on the concatenated batch."""

import os
import random

import pytest
import torch
import torch._dynamo  # which FSDP would otherwise import in each rank
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

import fastpcgrad
from fastpcgrad import methods, variants
from tests.distributed.ranks import DEVICE
from tests.distributed.scenarios import Scenarios

TASKS, STEPS = 3, 3
BATCH = 12
"""Of a process. Its parts in sequence parallelism must be alike: ``DTensor.from_local`` takes it for granted."""
SCENARIOS = Scenarios()


class Net(nn.Module):
    """A trunk and heads of odd sizes: shards are uneven, and those of the heads empty in all processes but one."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 1) for _ in range(TASKS))
        self.to(dtype)

    def forward(self, x, task=None):
        z = self.b(self.norm(self.a(x).tanh())).tanh()
        return [head(z)[:, 0] for head in self.heads] if task is None else self.heads[task](z)[:, 0]


def trunk_or_auto(parameters):
    """What several processes are to find out; of one process, in float64, by hand."""
    return parameters[:6] if parameters[0].dtype == torch.float64 else "auto"


def mesh(*shape):
    names = ("outer", "inner") if shape else ("all",)
    return init_device_mesh(DEVICE, shape or (dist.get_world_size(),), mesh_dim_names=names)


def sharded(net, on, reshard=True):
    for part in (net.a, net.b, net):
        fully_shard(part, mesh=on, reshard_after_forward=reshard)
    return net


def column_parallel(net, on):
    plan = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(net, on, {"a": plan, "b": plan})


def sequence_parallel(net, on):
    """The norm sees a part of the batch, so that its gradients are partial sums."""
    return parallelize_module(
        net,
        on,
        {
            "a": ColwiseParallel(output_layouts=Shard(0)),
            "norm": SequenceParallel(sequence_dim=0, use_local_output=True),
            "b": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
        },
    )


def two_dimensional(net, plane):
    return sharded(column_parallel(net, plane["inner"]), plane["outer"])


class Setting:
    """How the model is distributed: who makes it so, and which part of the batch this process sees."""

    def __init__(self, make, parts=None, part=None):
        self.make = make
        self.parts = dist.get_world_size() if parts is None else parts
        self.part = dist.get_rank() if part is None else part


def settings():
    """Those that this number of processes can have, or is to have: not every one with each."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    found = {"fully sharded": Setting(lambda net: sharded(net, mesh()))}
    if ranks < 3:
        found["sequence parallel"] = Setting(lambda net: sequence_parallel(net, mesh()), 1, 0)
    if ranks != 4:
        found["tensor parallel"] = Setting(lambda net: column_parallel(net, mesh()), 1, 0)
    if ranks < 3:
        found["fully sharded, kept"] = Setting(lambda net: sharded(net, mesh(), reshard=False))
        found["replicated"] = Setting(lambda net: replicate(net, mesh=mesh()))
    if ranks == 4:
        found["hybrid"] = Setting(lambda net: sharded(net, mesh(2, 2)))
        found["sharded and tensor parallel"] = Setting(lambda net: two_dimensional(net, mesh(2, 2)), 2, rank // 2)
    return found


SETTINGS = (
    "fully sharded",
    "fully sharded, kept",
    "replicated",
    "tensor parallel",
    "sequence parallel",
    "hybrid",
    "sharded and tensor parallel",
)


def in_each_setting(function):
    """A scenario for each way to distribute the model; one that this number of processes cannot have has nothing."""
    for name in SETTINGS:

        def run(name=name):
            if name in (known := settings()):
                function(name, known[name])

        SCENARIOS[f"{function.__name__} ({name})"] = run
    return function


def data(step, parts, part=None):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(parts * BATCH, 5, generator=generator).to(DEVICE)
    y = 3 * torch.randn(parts * BATCH, TASKS, generator=generator).to(DEVICE)
    own = slice(None) if part is None else slice(part * BATCH, (part + 1) * BATCH)
    return x[own], y[own]


def loss(output, y, task):
    return (output - y[:, task]).square().mean()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wholes(tensors):
    return [None if tensor is None else whole(tensor).detach().clone().cpu() for tensor in tensors]


def exact_rows(values, x, y):
    """The task gradients of one process in float64, with these parameters."""
    net = Net(torch.float64)
    parameters = list(net.parameters())
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
    x, y = x.cpu(), y.cpu()
    outputs = net(x.double())
    return [
        list(torch.autograd.grad(loss(outputs[t], y.double(), t), parameters, retain_graph=True, allow_unused=True))
        for t in range(TASKS)
    ]


class Twin:
    """One process on the concatenated batch, in float64."""

    def __init__(self, method, **options):
        self.parameters = list(Net(torch.float64).parameters())
        options = {name: chosen(self.parameters) if callable(chosen) else chosen for name, chosen in options.items()}
        self.surgery = fastpcgrad.GradientSurgery(self.parameters, TASKS, method, process_group="local", **options)
        self.surgery._stays.processes.check = lambda *_, **__: None  # looks through all live objects

    def merged(self, rows, present):
        for t in present:
            with self.surgery.task(t):
                for p, grad in zip(self.parameters, rows[t], strict=True):
                    p.grad = None if grad is None else grad.clone()
        report = self.surgery.merge()
        return [p.grad for p in self.parameters], report


def assert_right(parameters, expected, rows, report, unit=1e-6):
    """By the measure of the house, and alike in all processes; DTensors stay what they are."""
    weights = report.weights.nan_to_num(1.0).abs().reshape(-1, len(report.tasks)).amax(dim=0)
    lengths = [sum(grad.square().sum() for grad in rows[t] if grad is not None).sqrt() for t in report.tasks]
    scale = float(sum(w * n for w, n in zip(weights, lengths, strict=True)))
    found = wholes([p.grad for p in parameters])
    assert [f is None for f in found] == [e is None for e in expected]
    squared = sum(float((f.double() - e).square().sum()) for f, e in zip(found, expected, strict=True) if e is not None)
    assert squared**0.5 <= unit * scale, f"{squared**0.5 / scale:.1e}"
    for p in parameters:
        if p.grad is not None:
            assert p.grad.device == p.device
            assert type(p.grad) is (DTensor if isinstance(p, DTensor) else torch.Tensor)
            assert not isinstance(p, DTensor) or p.grad.placements == p.placements
    assert_alike(found)


def assert_alike(tensors):
    flat = torch.cat([tensor.flatten() for tensor in tensors if tensor is not None]).to(DEVICE)
    everywhere = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, flat)
    assert all(torch.equal(other, flat) for other in everywhere)


def task_by_task(surgery, net, x, y, present):
    for t in present:
        with surgery.task(t):
            loss(net(x, t), y, t).backward()
    return surgery.merge()


def of_one_forward(surgery, net, x, y, present):
    outputs = net(x)
    return surgery.backward([loss(outputs[t], y, t) if t in present else None for t in range(TASKS)])


def train(setting, method, call=task_by_task, absent=(), unit=1e-6, **options):
    """Three steps, each compared with one process; ``method`` makes a new one with the same seed each time."""
    net = setting.make(Net().to(DEVICE))
    parameters = list(net.parameters())
    chosen = {name: make(parameters) if callable(make) else make for name, make in options.items()}
    surgery = fastpcgrad.GradientSurgery(parameters, TASKS, method(), **chosen)
    for kept in ("row_dtype", "row_device", "process_group"):
        options.pop(kept, None)
    optimizer, twin = torch.optim.SGD(parameters, lr=0.05), Twin(method(), **options)
    for step in range(STEPS):
        present = [t for t in range(TASKS) if t not in absent or step != 1]
        x, y = data(step, setting.parts, setting.part)
        rows = exact_rows(wholes(parameters), *data(step, setting.parts))
        expected, right = twin.merged(rows, present)
        report = call(surgery, net, x, y, present)
        assert report.tasks == right.tasks
        torch.testing.assert_close(
            report.gram.cpu(), right.gram, rtol=0, atol=10 * unit * float(right.gram.abs().max())
        )
        assert_right(parameters, expected, rows, right, unit)
        assert_alike([report.gram, report.weights.nan_to_num()])
        optimizer.step()
    assert_alike(wholes(parameters))
    return surgery


METHODS = {
    **{name: lambda name=name: methods.PCGrad(name, generator=random.Random(0)) for name in variants.VARIANTS},
    "GradVac": lambda: methods.GradVac(generator=torch.Generator().manual_seed(0)),
    "NashMTL": lambda: methods.NashMTL(update_weights_every=2),
    "TrimmedMean": lambda: methods.TrimmedMean(1),
}


FEW = ("paper", "tensorlogic", "NashMTL", "TrimmedMean")
"""One of each kind of problem and state that the drop-in's methods below do not have."""
FEWER = ("paper", "TrimmedMean")
"""One with a Gram matrix, and one that works on each column."""


def chosen_methods(is_first):
    """All of two processes with the first setting; of other settings, and of more processes, what may differ there.

    FASTPCGRAD_TEST_METHODS=all: all of them everywhere.
    """
    if os.environ.get("FASTPCGRAD_TEST_METHODS") == "all":
        return METHODS
    if dist.get_world_size() > 2:
        return FEW if is_first and dist.get_world_size() == 3 else FEWER
    return METHODS if is_first else FEW


@in_each_setting
def one_forward_a_task(name, setting):
    for chosen in chosen_methods(name == "fully sharded"):
        train(setting, METHODS[chosen], absent=(1,) if chosen in ("paper", "GradVac") else ())


@in_each_setting
def the_drop_in_and_losses_of_one_forward(name, setting):
    for chosen in ("pytorch-pcgrad", "libmtl", "GradVac")[: 3 if dist.get_world_size() == 2 else 1]:
        train(setting, METHODS[chosen], of_one_forward)


@SCENARIOS.each(of_shards=False, over_replicas=True)
def gradients_that_fully_shard_keeps_end_the_task(over_replicas):
    """They would come with those of the next task. Those of micro-batches that the last one reduces are all there."""
    net = Net().to(DEVICE)
    net = sharded(net, mesh(1, dist.get_world_size()) if not over_replicas else mesh(dist.get_world_size(), 1))
    switch = net.set_requires_all_reduce if over_replicas else net.set_requires_gradient_sync
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, METHODS["paper"]())
    x = torch.randn(2, BATCH, 5, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(dist.get_rank()))
    reports = []
    for together in (True, False):
        for task in range(TASKS):
            with surgery.task(task):
                parts = [x.flatten(0, 1)] if together else list(x)
                for number, part in enumerate(parts, 1):
                    switch(number == len(parts))
                    (net(part, task).sum() / (2 * BATCH)).backward()
        reports.append(surgery.merge())
    torch.testing.assert_close(reports[0].gram, reports[1].gram, rtol=1e-5, atol=1e-9)
    switch(False)
    with pytest.raises(RuntimeError, match="has kept gradients of a parameter"), surgery.task(0):
        net(x[0], 0).sum().backward()
