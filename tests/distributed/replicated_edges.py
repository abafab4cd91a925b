"""Data parallelism: what ends a round in all processes, and what is refused by name."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastpcgrad
from fastpcgrad import FastPCGradWarning, methods
from fastpcgrad.distributed import exchange
from tests.distributed.ranks import DEVICE
from tests.distributed.replicated import ddp, functions, losses_of, ordinary_steps_are_right, own, then_ordinary
from tests.distributed.scenarios import Scenarios
from tests.distributed.sharded import METHODS, TASKS, Net, assert_alike, loss

SCENARIOS = Scenarios()
scenario, each = SCENARIOS.one, SCENARIOS.each


class Fault(Exception):
    pass


def failing(losses, at):
    """In the last process, at the backward pass of one of them."""
    if dist.get_rank() == dist.get_world_size() - 1:
        losses[at].register_hook(fault)
    return losses


def fault(_):
    raise Fault


@each(first=0, last=TASKS - 1)
def a_process_that_fails_ends_the_round_everywhere(at):
    net, last = ddp(Net().to(DEVICE)), dist.get_world_size() - 1
    parameters = list(net.parameters())
    surgery = fastpcgrad.GradientSurgery(parameters, TASKS, methods.PCGrad("tensorflow"))
    kept_nothing = {"method": methods.PCGrad("tensorflow")}

    def task_by_task(losses):
        for t, own_loss in enumerate(losses):
            with surgery.task(t), net.no_sync():
                own_loss.backward(retain_graph=True)

    for call in (surgery.backward, lambda losses: fastpcgrad.backward(losses, **kept_nothing), task_by_task):
        error, words = (Fault, "") if dist.get_rank() == last else (exchange.OutOfStep, f"process {last} has failed")
        with pytest.raises(error, match=words):
            with net.no_sync():  # the passes of a loop of one's own are not to be averaged before they fail
                losses = losses_of(net)
            call(failing(losses, at))
        assert all(p.grad is None for p in parameters)
    surgery.backward(losses_of(net))
    assert_alike([p.grad for p in parameters])
    ordinary_steps_are_right(net, parameters)


@scenario
def processes_that_have_not_learned_the_same_are_told():
    """Of which parameters several tasks reach: one has loaded a checkpoint, the others have not."""
    net = ddp(Net().to(DEVICE))
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.UPGrad(), shared="auto")
    if dist.get_rank() == 0:
        reached = [(1 << TASKS) - 1] * len(list(net.parameters()))
        surgery.load_state_dict({**surgery.state_dict(), "reach": {"tasks": 1, "reached": reached}})
    with pytest.raises(exchange.OutOfStep, match="go on from the same checkpoint"):
        surgery.backward(losses_of(net))
    assert [p.grad for p in net.parameters()] == [None] * len(list(net.parameters()))


@scenario
def processes_that_do_not_do_alike_are_told():
    net = ddp(Net().to(DEVICE))
    parameters = list(net.parameters())
    surgery = fastpcgrad.GradientSurgery(parameters, TASKS, methods.PCGrad("tensorflow"))
    losses = losses_of(net)
    losses[dist.get_rank() % 2] = None
    with pytest.raises(exchange.OutOfStep, match="None for the same losses"):
        surgery.backward(losses)
    surgery.backward(losses_of(net))
    other = [nn.Parameter(torch.ones(3 + dist.get_rank(), device=DEVICE))]
    with pytest.raises(exchange.OutOfStep):
        fastpcgrad.backward([other[0].sum(), other[0].square().sum()], other, process_group=dist.group.WORLD)
    assert other[0].grad is None


def refused(call, parameters, *words, error=NotImplementedError):
    for p in parameters:
        p.grad = None
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert all(p.grad is None for p in parameters)


@scenario
def a_static_graph_is_refused_where_it_would_never_average_again():
    for door in ("losses", "functions", "backward"):
        net = ddp(Net().to(DEVICE), static_graph=True)
        parameters = list(net.parameters())
        surgery = fastpcgrad.GradientSurgery(parameters, TASKS)
        calls = {
            "losses": lambda s=surgery, n=net: s.backward(losses_of(n)),
            "functions": lambda s=surgery, n=net: functions(s, n, *own(0), range(TASKS)),
            "backward": lambda n=net: fastpcgrad.backward(losses_of(n)),
        }
        refused(calls[door], parameters, "static_graph=False")
        ordinary_steps_are_right(net, parameters)
    then_ordinary(lambda net: ddp(net, static_graph=True), METHODS["tensorflow"], all_heads_a_task)


def all_heads_a_task(surgery, net, x, y, present):
    """A static graph is to be the same in all passes."""
    for t in present:
        with surgery.task(t):
            outputs = net(x)
            (loss(outputs[t], y, t) + 0 * sum(output.sum() for output in outputs)).backward()
    return surgery.merge()


@scenario
def what_is_not_covered_is_refused_by_name():
    net = ddp(Net().to(DEVICE))
    parameters, (x, y) = list(net.parameters()), own(0)
    extra = nn.Parameter(torch.ones(3, device=DEVICE))

    def surgery_of(found=parameters, **options):
        return fastpcgrad.GradientSurgery(found, TASKS, **options).backward(losses_of(net))

    refused(lambda: surgery_of([*parameters, extra]), parameters, "does not average", "1 of", "[3]")
    refused(lambda: surgery_of(accumulate_dtype=torch.float64), parameters, "accumulate_dtype")
    leaf = x.clone().requires_grad_()
    losses = [loss(o, y, t) for t, o in enumerate(net(leaf))]
    refused(lambda: fastpcgrad.grad(losses, [leaf]), parameters, "does not average")
    two_phases = fastpcgrad.GradientSurgery(parameters, TASKS)
    losses = losses_of(net)
    refused(lambda: two_phases.backward(losses, two_phase=True), parameters, "two_phase", "means over")
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    refused(lambda: surgery_of(process_group=alone), parameters, "2 different process groups")
    losses = losses_of(net)
    net.mixed_precision = True
    surgery = fastpcgrad.GradientSurgery(parameters, TASKS)
    refused(lambda: surgery.backward(losses), parameters, "mixed_precision")
    net.mixed_precision = None
    surgery_of([*parameters, extra], process_group=dist.group.WORLD)
    assert extra.grad is None
    ordinary_steps_are_right(net, parameters)
    with net.join():
        refused(surgery_of, parameters, "join()")


@scenario
def a_communication_hook_is_said_to_be_unused():
    net = ddp(Net().to(DEVICE))
    net.register_comm_hook(None, lambda state, bucket: bucket.buffer())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS)
    with pytest.warns(FastPCGradWarning, match="communication hook of DistributedDataParallel"):
        surgery.backward(losses_of(net))


@scenario
def rows_are_not_copied_within_a_round():
    net = ddp(Net().to(DEVICE), find_unused_parameters=True)
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS)
    x, y = own(0)
    with surgery.task(0):
        loss(net(x, 0), y, 0).backward()
    with pytest.raises(RuntimeError, match="within a round"):
        surgery.__getstate__()
    surgery.discard()
    surgery.__getstate__()
