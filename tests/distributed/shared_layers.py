"""Two processes: surgery and balancing at layers that their modules share or average."""

import warnings

import torch
import torch._dynamo  # which FSDP would otherwise import in each rank
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastpcgrad
from fastpcgrad import FastPCGradWarning, balancing
from fastpcgrad.distributed import processes
from tests.distributed.own_batches import (
    TASKS,
    Net,
    assert_grads,
    assert_ordinary_steps_are_right,
    assert_refused,
    batch,
    fixed_order,
    losses,
    mesh,
    no_warning,
    own_batch,
    rows,
)
from tests.distributed.scenarios import Scenarios

SCENARIOS = Scenarios()
scenario, each = SCENARIOS.one, SCENARIOS.each


@scenario
def shared_features_walk_the_graph_of_a_trunk_once():
    net = Net()
    walks = []
    walk = processes.leaves

    def counted(outputs, **options):
        walks.append(0)
        for leaf in walk(outputs, **options):
            walks[-1] += 1
            yield leaf

    processes.leaves = counted
    try:
        for _ in range(3):
            fastpcgrad.shared_features(net.trunk(own_batch()[0]), TASKS, process_group="local")
    finally:
        processes.leaves = walk
    assert walks == [1, 4, 1, 1]


@scenario
def shared_features_under_ddp_are_locally_a_mean_of_surgeries():
    options = {"process_group": "local"}
    net = Net(lambda z: fastpcgrad.shared_features(z, TASKS, fixed_order(), **options))
    wrapped = DistributedDataParallel(net)
    parameters = list(net.parameters())
    for p in parameters:
        p.grad = None
    with no_warning():
        sum(losses(wrapped, *own_batch())).backward()
    mean = [torch.zeros_like(p) for p in parameters]
    for rank in range(2):
        alone = Net(lambda z: fastpcgrad.shared_features(z, TASKS, fixed_order(), process_group="local"))
        sum(losses(alone, *batch([rank]))).backward()
        for total, p in zip(mean, alone.parameters(), strict=True):
            total += p.grad / 2
    assert_grads(parameters, mean)
    net.between = None
    assert_ordinary_steps_are_right(wrapped, parameters)


def norms_at_the_layer(x, y):
    layer = next(i for i, p in enumerate(Net().parameters()) if p.shape == (4, 8))
    return torch.stack([row[layer].norm() for row in rows(x, y)])


@scenario
def gradnorm_balances_locally_where_that_is_asked_for():
    net = Net()
    wrapped = DistributedDataParallel(net)
    parameters, balancer = list(net.parameters()), balancing.GradNorm(TASKS, 0.5, process_group="local").double()
    with no_warning():
        balancer.note_gradients(losses(wrapped, *own_batch()), net.trunk[2])
    found = torch.stack([norm for _, norm in balancer._noted])
    torch.testing.assert_close(found, norms_at_the_layer(*own_batch()))
    assert all(p.grad is None for p in parameters)
    assert_ordinary_steps_are_right(wrapped, parameters)


@scenario
def gradnorm_with_a_static_graph_is_refused_also_locally():
    net = Net()
    wrapped = DistributedDataParallel(net, static_graph=True)
    parameters, balancer = list(net.parameters()), balancing.GradNorm(TASKS, 0.5, process_group="local").double()
    assert_refused(
        lambda: balancer.note_gradients(losses(wrapped, *own_batch()), net.trunk[2]),
        parameters,
        "static_graph=False",
    )
    assert_ordinary_steps_are_right(wrapped, parameters)


@scenario
def gradnorm_with_averaged_losses_and_norms_is_that_of_the_whole_batch():
    """What the refusal says is to be done."""
    net, alone = Net(), Net()
    wrapped = DistributedDataParallel(net)
    balancer, expected = (balancing.GradNorm(TASKS, 0.5).double() for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastPCGradWarning)
        expected.note_gradients(losses(alone, *batch()), alone.trunk[2])
    for t in range(TASKS):
        wrapped.zero_grad()
        loss = losses(wrapped, *own_batch())[t]
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        balancer.note(t, mean / dist.get_world_size(), net.trunk[2].weight.grad.norm())
    balancer.update()
    expected.update()
    torch.testing.assert_close(balancer.weights, expected.weights)
    torch.testing.assert_close(balancer.initial_losses, expected.initial_losses)


@each(
    fully_sharded=lambda net: fully_shard(net, mesh=mesh()),
    tensor_parallel=lambda net: parallelize_module(
        net, mesh(), {"trunk.2": ColwiseParallel(output_layouts=Replicate())}
    ),
)
def gradnorm_refuses_a_sharded_layer(shard):
    for choice in ("auto", "local"):
        net = shard(Net())
        parameters = list(net.parameters())
        balancer = balancing.GradNorm(TASKS, 0.5, process_group=choice).double()
        found = losses(net, *batch())
        assert_refused(
            lambda b=balancer, f=found, n=net: b.note_gradients(f, n.trunk[2]),
            parameters,
            "found a",
        )


class Stacked(nn.Module):
    """Gives its losses as one tensor, as ``gradNorm`` wants them."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, y):
        return torch.stack(losses(self.net, x, y))


@scenario
def the_gradnorm_loop_refuses_ddp_and_is_local_where_that_is_asked_for():
    net = Stacked()
    wrapped = DistributedDataParallel(net)
    parameters = list(net.parameters())
    arguments = (wrapped, net.net.trunk[2], 0.5, [own_batch()] * 3, 1, 1e-3, 1e-2, True)
    before = [p.detach().clone() for p in parameters]
    assert_refused(lambda: fastpcgrad.gradNorm(*arguments), parameters, "DistributedDataParallel", "note(task")
    assert all(map(torch.equal, parameters, before))
    with no_warning():
        fastpcgrad.gradNorm(*arguments, process_group="local")
    for p in parameters:  # the gradients were averaged: all processes took the same steps
        other = p.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, p)
