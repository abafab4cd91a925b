"""Data parallelism: surgery at features and balancers see the whole batch, as one process that has it would."""

from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fastpcgrad
from fastpcgrad import balancing, methods, variants
from tests.distributed.own_batches import TASKS, Net, assert_grads, batch, losses, own_batch
from tests.distributed.scenarios import Scenarios

SCENARIOS = Scenarios()
each = SCENARIOS.each
STEPS = 3


def alike(tensor):
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor.contiguous())
    assert all(torch.equal(other, tensor) for other in everywhere)


def seeded(name):
    return methods.PCGrad(name, generator=torch.Generator().manual_seed(0))


FEATURE_METHODS = {
    **{name: partial(seeded, name) for name in variants.VARIANTS},
    "GradVac": lambda: methods.GradVac(generator=torch.Generator().manual_seed(0)),
    "TrimmedMean": lambda: methods.TrimmedMean(1),
}


@each(auto="auto", group="group", mesh="mesh")
def features_of_all_processes_are_those_of_one(choice):
    for make in FEATURE_METHODS.values():
        of_all, of_one = make(), make()
        groups = {"auto": "auto", "group": dist.group.WORLD}
        group = groups.get(choice) or init_device_mesh("cpu", (dist.get_world_size(),))
        net = Net(lambda z, m=of_all, g=group: fastpcgrad.shared_features(z, TASKS, m, process_group=g))
        one = Net(lambda z, m=of_one: fastpcgrad.shared_features(z, TASKS, m, process_group="local"))
        wrapped = DistributedDataParallel(net)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (net, one)]
        for _ in range(STEPS):
            for optimizer in optimizers:
                optimizer.zero_grad()
            sum(losses(wrapped, *own_batch())).backward()
            sum(losses(one, *batch())).backward()
            assert_grads(list(net.parameters()), [p.grad for p in one.parameters()])
            for optimizer in optimizers:
                optimizer.step()


@each(left_out=None)
def a_task_that_only_some_processes_have(_):
    """Where a process has no loss of a task, it counts as one whose loss is zero there."""
    method = methods.PCGrad("tensorflow")
    net = Net(lambda z: fastpcgrad.shared_features(z, TASKS, method, allow_absent=True))
    one = Net(lambda z: fastpcgrad.shared_features(z, TASKS, method, allow_absent=True, process_group="local"))
    wrapped = DistributedDataParallel(net)
    here = [1.0] * (TASKS - 1) + [0.0 if dist.get_rank() else 1.0]
    sum(loss for loss, there in zip(losses(wrapped, *own_batch()), here, strict=True) if there).backward()
    x, y = batch()
    parts = dist.get_world_size()
    outputs = one(x)
    total = sum((o - y[:, t]).square().mean() for t, o in enumerate(outputs[:-1]))
    rows = len(x) // parts
    (total + (outputs[-1] - y[:, TASKS - 1])[:rows].square().mean() / parts).backward()
    assert_grads(list(net.parameters()), [p.grad for p in one.parameters()])


def gradnorm(group):
    return balancing.GradNorm(TASKS, 1.5, partial(torch.optim.SGD, lr=0.01), process_group=group).double()


BALANCERS = {
    "GradNorm": gradnorm,
    "FAMO": lambda group: balancing.FAMO(TASKS, process_group=group).double(),
    "DWA": lambda group: balancing.DWA(TASKS, process_group=group).double(),
    "STCH": lambda group: balancing.STCH(TASKS, 0.5, process_group=group).double(),
    "UncertaintyWeighting": lambda group: balancing.UncertaintyWeighting(TASKS, process_group=group).double(),
    "COSMOS": lambda group: balancing.COSMOS(TASKS, process_group=group).double(),
    "GeometricMean": lambda group: balancing.GeometricMean(TASKS, process_group=group).double(),
    "IMTLL": lambda group: balancing.IMTLL(TASKS, process_group=group).double(),
    "PBI": lambda group: balancing.PBI(TASKS, process_group=group).double(),
}


def steps(model, net, balancer, data):
    learned = [p for p in balancer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*net.parameters(), *learned], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        found = losses(model, *data)
        if isinstance(balancer, balancing.GradNorm):
            balancer.note_gradients(found, net.trunk[2])
        sum(balancer(found)).backward()
        optimizer.step()
        if isinstance(balancer, balancing.GradNorm):
            balancer.update()
        if isinstance(balancer, balancing.FAMO):
            with torch.no_grad():
                balancer.update(losses(net, *data))
        if isinstance(balancer, balancing.DWA):
            balancer.end_epoch()


@each(**BALANCERS)
def balancers_weigh_as_one_process_does(make):
    for group in ("auto", dist.group.WORLD):
        net, one = Net(), Net()
        balancer, right = make(group), make("local")
        steps(DistributedDataParallel(net), net, balancer, own_batch())
        steps(one, one, right, batch())
        torch.testing.assert_close(balancer.weights, right.weights, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(list(net.parameters()), list(one.parameters()), rtol=1e-10, atol=1e-12)
        alike(balancer.weights.detach())


@each(nan=None)
def a_loss_that_is_not_finite_in_one_process_skips_the_step_in_all(_):
    net, balancer = Net(), BALANCERS["FAMO"]("auto")
    wrapped = DistributedDataParallel(net)
    before = balancer.weights.clone()
    found = losses(wrapped, *own_batch())
    if not dist.get_rank():
        found[0] = found[0] * torch.nan
    balancer(found)
    assert torch.equal(balancer.weights, before)
    sum(losses(wrapped, *own_batch())).backward()
