"""Rounds of several processes: agreement where they are not alike, and what ends a round everywhere."""

import ctypes
import os
import random
from pathlib import Path

import pytest
import torch
import torch._dynamo  # which FSDP would otherwise import in each rank
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.distributed import exchange
from fastpcgrad.rows import host
from tests.distributed.ranks import DEVICE
from tests.distributed.scenarios import Scenarios
from tests.distributed.sharded import (
    TASKS,
    Net,
    Setting,
    assert_alike,
    column_parallel,
    data,
    loss,
    mesh,
    sharded,
    task_by_task,
    train,
    trunk_or_auto,
    wholes,
)
from tests.late_copies import LateCopies

SCENARIOS = Scenarios()
scenario, each = SCENARIOS.one, SCENARIOS.each


def fully_sharded():
    return Setting(lambda net: sharded(net, mesh()))


def tensor_parallel():
    return Setting(lambda net: column_parallel(net, mesh()), 1, 0)


UNLIKE = {
    "PCGrad": lambda: methods.PCGrad("paper", generator=random.Random(dist.get_rank())),
    "GradVac": lambda: methods.GradVac(generator=torch.Generator().manual_seed(dist.get_rank())),
    "RandomWeights": lambda: methods.RandomWeights(torch.Generator().manual_seed(dist.get_rank())),
    "GradDrop": lambda: methods.GradDrop(generator=torch.Generator().manual_seed(dist.get_rank())),
}


@each(**UNLIKE)
def generators_that_are_not_seeded_alike_leave_all_alike(method):
    for setting in (fully_sharded(), tensor_parallel()):
        net, own = setting.make(Net().to(DEVICE)), method()
        parameters = list(net.parameters())
        surgery = fastpcgrad.GradientSurgery(parameters, TASKS, own)
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for step in range(3):
            report = task_by_task(surgery, net, *data(step, setting.parts, setting.part), range(TASKS))
            assert_alike([report.gram, report.weights.nan_to_num()])
            assert_alike(wholes([p.grad for p in parameters]))
            optimizer.step()
            assert_alike(
                [value for value in own.state_dict().values() if isinstance(value, torch.Tensor)] or [report.gram]
            )
        assert_alike(wholes(parameters))


@scenario
def what_is_drawn_for_shards_is_not_the_same_in_each():
    """Where positive and negative entries are as large, each column is one of two numbers, in half of them each."""
    net = fully_shard(torch.nn.Linear(64, 64, bias=False, device=DEVICE), mesh=mesh())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), 2, methods.GradDrop())
    for t in range(2):
        with surgery.task(t):
            ((2 * t - 1) * net(torch.ones(1, 64, device=DEVICE)).sum()).backward()
    surgery.merge()
    signs = net.weight.grad.full_tensor().sign()
    assert 0.4 < (signs > 0).double().mean() < 0.6
    half = len(signs) // dist.get_world_size()
    assert not torch.equal(signs[:half], signs[half : 2 * half])


def round_of(surgery, net, fault):
    """Three tasks; ``fault(rank, task)`` runs inside each, after its backward pass."""
    x, y = data(0, dist.get_world_size(), dist.get_rank())
    for t in range(TASKS):
        with surgery.task(t):
            loss(net(x, t), y, t).backward()
            fault(t)
    return surgery.merge()


class Fault(Exception):
    pass


@each(**{"first": 0, "middle": 1, "last": 2})
def a_process_that_fails_inside_a_task_ends_the_round_everywhere(where):
    net = sharded(Net().to(DEVICE), mesh())
    parameters, last = list(net.parameters()), dist.get_world_size() - 1
    surgery = fastpcgrad.GradientSurgery(parameters, TASKS, methods.UPGrad())
    for p in parameters:
        p.grad = None

    def fault(task):
        if task == where and dist.get_rank() == last:
            raise Fault

    error, words = (Fault, "") if dist.get_rank() == last else (exchange.OutOfStep, f"process {last} has failed")
    with pytest.raises(error, match=words):
        round_of(surgery, net, fault)
    assert all(p.grad is None for p in parameters)
    round_of(surgery, net, lambda task: None)  # the next one is right again
    assert_alike(wholes([p.grad for p in parameters]))


def skips(surgery, net, x, y):
    present = range(TASKS - 1) if dist.get_rank() else range(TASKS)
    return task_by_task(surgery, net, x, y, present)


def another_order(surgery, net, x, y):
    order = range(TASKS) if dist.get_rank() else range(TASKS)[::-1]
    return task_by_task(surgery, net, x, y, order)


def twice(surgery, net, x, y):
    order = [0, 1, 2] if dist.get_rank() else [0, 1, 1]
    return task_by_task(surgery, net, x, y, order)


def other_losses(surgery, net, x, y):
    absent = 0 if dist.get_rank() else 1
    losses = [loss(output, y, t) if t != absent else None for t, output in enumerate(net(x))]
    return surgery.backward(losses)


def merges_without(surgery, net, x, y):
    if dist.get_rank():
        return task_by_task(surgery, net, x, y, range(TASKS))
    return surgery.merge()


@each(skips=skips, order=another_order, twice=twice, losses=other_losses, merges_without=merges_without)
def processes_that_do_not_do_alike_are_told(call):
    setting = tensor_parallel()  # whose passes pair up whatever the task is
    net = setting.make(Net().to(DEVICE))
    parameters = list(net.parameters())
    surgery = fastpcgrad.GradientSurgery(parameters, TASKS, methods.UPGrad())
    x, y = data(0, 1, 0)
    for _ in range(2):
        with pytest.raises(exchange.OutOfStep, match=f"process {dist.get_rank()} is at: "):
            call(surgery, net, x, y)
        assert all(p.grad is None for p in parameters)
    task_by_task(surgery, net, x, y, range(TASKS))
    assert_alike(wholes([p.grad for p in parameters]))


@scenario
def plain_parameters_with_other_gradients_in_each_process_are_refused():
    net = Net().to(DEVICE)
    for part in (net.a, net.b):
        fully_shard(part, mesh=mesh())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.UPGrad())
    with pytest.raises(RuntimeError, match="no DTensors differ"):
        task_by_task(surgery, net, *data(0, dist.get_world_size(), dist.get_rank()), range(TASKS))
    assert all(p.grad is None for p in net.parameters())


@scenario
def two_phases_are_refused_by_name():
    net = column_parallel(Net().to(DEVICE), mesh())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS)
    x, y = data(0, 1, 0)
    with pytest.raises(NotImplementedError, match=r"two_phase.*DTensors.*DeviceMesh"):
        surgery.backward([loss(output, y, t) for t, output in enumerate(net(x))], two_phase=True)


@scenario
def what_is_sent_does_not_depend_on_the_width():
    """G, w and C, some 8·T² bytes each, and five numbers at each of T + 1 points."""
    sent = []
    for width in (8, 64):
        net = fully_shard(torch.nn.Linear(width, width, device=DEVICE), mesh=mesh())
        surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.PCGrad("tensorflow"))
        for t in range(TASKS):
            with surgery.task(t):
                net(torch.full((2, width), t + 1.0, device=DEVICE)).square().mean().backward()
        surgery.merge()
        sent.append(surgery._layouts.current.exchange.nbytes)
    assert sent[0] == sent[1] <= 8 * (3 * TASKS**2 + TASKS) + 40 * (TASKS + 1)


def most_memory(work):
    """The most memory that a call takes beyond what is there before it, in bytes."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


@scenario
def memory_is_that_of_the_plan():
    """Beyond what plain backward passes take, which leave one row: rows are what they left, and no copies."""
    if dist.get_world_size() > 2:  # takes longer than all others, and no other way
        return
    tasks, width = 4, 512
    net = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False, device=DEVICE) for _ in range(12)))
    for part in (*net, net):
        fully_shard(part, mesh=mesh())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), tasks, methods.UPGrad())
    x = torch.ones(2, width, device=DEVICE)

    def plain():
        for _ in range(tasks):
            net.zero_grad()
            net(x).square().mean().backward()

    def merged():
        for t in range(tasks):
            with surgery.task(t):
                net(x).square().mean().backward()
        surgery.merge()

    plain()
    net.zero_grad()
    without = most_memory(plain)
    net.zero_grad()
    taken, plan = most_memory(merged), surgery.memory_plan().device
    assert abs(without + plan.total - plan.rows // tasks - taken) <= 0.1 * plan.total, (without, taken, plan)


@each(
    full={},
    shared={"shared": lambda ps: ps[:2]},
    auto={"shared": trunk_or_auto},
    gram_over={"gram_over": lambda ps: ps[:6]},
    parameter={"granularity": "parameter"},
    bf16={"row_dtype": torch.bfloat16},
)
def choices_of_a_surgery(options):
    unit = 4e-3 if "row_dtype" in options else 1e-6
    for setting in (fully_sharded(), tensor_parallel()):
        train(setting, lambda: methods.PCGrad("tensorflow"), unit=unit, **options)


@scenario
def rows_in_host_memory():
    """Where no GPU is, what stands in for its copies; and G goes through gloo, as NCCL takes nothing on the host."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(host, "copies_for", lambda device, chosen: LateCopies() if chosen else None)
            patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        for setting in (fully_sharded(), tensor_parallel()):
            surgery = train(setting, lambda: methods.PCGrad("tensorflow"), row_device="cpu")
            assert surgery._layouts.current.capture.rows.on_host


@scenario
def several_backward_passes_of_a_task_add_up():
    setting = fully_sharded()
    net, twin = setting.make(Net().to(DEVICE)), setting.make(Net().to(DEVICE))
    surgeries = [fastpcgrad.GradientSurgery(m.parameters(), TASKS, methods.PCGrad("tensorflow")) for m in (net, twin)]
    x, y = data(0, setting.parts, setting.part)
    for t in range(TASKS):
        for _ in range(2):
            with surgeries[0].task(t):
                loss(net(x, t), y, t).backward()
        with surgeries[1].task(t):
            (2 * loss(twin(x, t), y, t)).backward()
    for surgery in surgeries:
        surgery.merge()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad.full_tensor())


@scenario
def the_dead_are_the_process_groups_own_error():
    net = sharded(Net().to(DEVICE), mesh())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.UPGrad())
    round_of(surgery, net, lambda task: None)
    last = dist.get_world_size() - 1

    def fault(task):
        if task == 1 and dist.get_rank() == last:
            os._exit(1)

    with pytest.raises(RuntimeError, match=r"[Cc]onnection|[Rr]eset|closed"):
        round_of(surgery, net, fault)


DIES = "the_dead_are_the_process_groups_own_error"
"""The last one: nothing runs in the process that dies after it."""
