"""Surgery under data parallelism: parts of a batch are merged as one process would that has all of it."""

import contextlib
import random

import pytest
import torch
import torch._dynamo.backends.debugging  # which compiling would otherwise import in each rank
import torch._functorch.aot_autograd
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.distributed import buckets
from fastpcgrad.distributed.cost import Step
from tests.distributed.ranks import DEVICE
from tests.distributed.scenarios import Scenarios
from tests.distributed.sharded import (
    METHODS,
    TASKS,
    Net,
    Setting,
    assert_alike,
    chosen_methods,
    data,
    exact_rows,
    loss,
    of_one_forward,
    train,
    trunk_or_auto,
    wholes,
)
from tests.distributed.together import most_memory


def in_small_buckets(work):
    """Of 50 columns: some parameters lie in several, and several in one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "NBYTES", 200)
        work()


SCENARIOS = Scenarios(in_small_buckets)
scenario, each = SCENARIOS.one, SCENARIOS.each


def ddp(net, **options):
    return DistributedDataParallel(net, **options)


WRAPPED = {
    "plain": ddp,
    "bucket view": lambda net: ddp(net, gradient_as_bucket_view=True),
    "unused": lambda net: ddp(net, find_unused_parameters=True),
    "composed": replicate,
}


def ordinary_steps_are_right(net, parameters):
    """As if there had been no surgery: the mean over all processes, twice."""
    x, y = data(7, dist.get_world_size())
    rows = exact_rows(wholes(parameters), x, y)
    total = [sum(g for g in column if g is not None) for column in zip(*rows, strict=True)]
    for _ in range(2):
        for p in parameters:
            p.grad = None
        own_x, own_y = data(7, dist.get_world_size(), dist.get_rank())
        sum(loss(output, own_y, t) for t, output in enumerate(net(own_x))).backward()
        for p, right in zip(parameters, total, strict=True):
            torch.testing.assert_close(p.grad.cpu().double(), right, rtol=1e-4, atol=1e-5)


def then_ordinary(wrap, *arguments, **options):
    """``train``, and ordinary steps with the model that it trained."""
    made = []

    def make(net):
        made.append(wrap(net))
        return made[0]

    surgery = train(Setting(make), *arguments, **options)
    ordinary_steps_are_right(made[0], list(made[0].parameters()))
    return surgery


@each(**WRAPPED)
def losses_of_one_forward(wrap):
    for chosen in chosen_methods(wrap is ddp):
        then_ordinary(wrap, METHODS[chosen], of_one_forward, absent=(1,) if chosen == "paper" else ())


@scenario
def losses_of_one_forward_of_a_compiled_model():
    if dist.get_world_size() == 2:  # to compile takes longer than all others
        wrap = lambda net: torch.compile(ddp(net), backend="aot_eager")  # noqa: E731
        then_ordinary(wrap, METHODS["tensorflow"], of_one_forward)


def with_its_backward(sync):
    def call(surgery, net, x, y, present):
        for t in present:
            with surgery.task(t), contextlib.nullcontext() if sync else net.no_sync():
                loss(net(x, t), y, t).backward()
        return surgery.merge()

    return call


def functions(surgery, net, x, y, present):
    return surgery.backward([(lambda t=t: loss(net(x, t), y, t)) if t in present else None for t in range(TASKS)])


@each(
    synced=(WRAPPED["unused"], with_its_backward(True)),
    local=(ddp, with_its_backward(False)),
    view=(lambda net: ddp(net, gradient_as_bucket_view=True, find_unused_parameters=True), with_its_backward(True)),
    functions=(ddp, functions),
)
def one_forward_a_task(case):
    wrap, call = case
    for chosen in chosen_methods(False):
        then_ordinary(wrap, METHODS[chosen], call, absent=(1,) if chosen == "paper" else ())


@each(
    shared={"shared": lambda ps: ps[:2]},
    auto={"shared": trunk_or_auto},
    gram_over={"gram_over": lambda ps: ps[:6]},
    parameter={"granularity": "parameter"},
    bf16={"row_dtype": torch.bfloat16},
    mean={"accumulate": "mean"},
)
def choices_of_a_surgery(options):
    unit = 4e-3 if "row_dtype" in options else 1e-6
    then_ordinary(ddp, METHODS["tensorflow"], of_one_forward, unit=unit, **options)


@each(**{name: wrap for name, wrap in WRAPPED.items() if name != "composed"})
def functions_that_keep_nothing(wrap):
    """``backward`` and ``grad``, as ``train`` has them."""
    made = []

    def call(surgery, net, x, y, present):
        """The surgery's own report, and another way to the same gradients."""
        made[:] = [net]
        losses = [loss(output, y, t) for t, output in enumerate(net(x))]
        parameters = list(net.parameters())
        found = fastpcgrad.grad(losses, parameters, method=METHODS["tensorflow"](), retain_graph=True)
        for p in parameters:
            p.grad = None
        fastpcgrad.backward(losses, method=METHODS["tensorflow"](), retain_graph=True)
        report = surgery.backward(losses)
        for p, new in zip(parameters, found, strict=True):
            assert torch.equal(p.grad, new)
        return report

    train(Setting(wrap), METHODS["tensorflow"], call)
    ordinary_steps_are_right(made[0], list(made[0].parameters()))


@each(
    group=lambda: dist.group.WORLD,
    mesh=lambda: init_device_mesh(DEVICE, (dist.get_world_size(),)),
)
def a_group_that_is_given_will_do(choose):
    """Also where no module averages anything."""
    train(Setting(lambda net: net), METHODS["tensorflow"], of_one_forward, process_group=choose())


@scenario
def the_group_is_found_and_named():
    net = Net().to(DEVICE)
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS)
    wrapped = ddp(net)  # as trainers do, after the optimizer
    x, y = own(0)
    of_one_forward(surgery, wrapped, x, y, range(TASKS))
    assert f"means over {dist.get_world_size()} processes" in repr(surgery)


def own(step):
    return data(step, dist.get_world_size(), dist.get_rank())


UNLIKE = {
    "PCGrad": lambda: methods.PCGrad("paper", generator=random.Random(dist.get_rank())),
    "GradDrop": lambda: methods.GradDrop(generator=torch.Generator().manual_seed(dist.get_rank())),
}


@each(**UNLIKE)
def generators_that_are_not_seeded_alike_leave_all_alike(method):
    net = ddp(Net().to(DEVICE))
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.05), method=method())
    for step in range(3):
        x, y = own(step)
        optimizer.pc_backward([loss(output, y, t) for t, output in enumerate(net(x))])
        assert_alike([p.grad for p in net.parameters()])
        optimizer.step()
    assert_alike([p.detach() for p in net.parameters()])


@scenario
def a_parameter_that_some_processes_do_not_use_counts_as_zero_there():
    net, twin = ddp(Net().to(DEVICE), find_unused_parameters=True), Net(torch.float64)
    surgery = fastpcgrad.GradientSurgery(net.parameters(), 2, methods.PCGrad("tensorflow"))
    (x, y), here = own(0), dist.get_rank() == 0
    outputs = net(x)
    found = [loss(outputs[0], y, 0), loss(outputs[1], y, 1) + (loss(outputs[2], y, 2) if here else 0)]
    report = surgery.backward(found)
    whole, of_all = data(0, dist.get_world_size()), twin(data(0, dist.get_world_size())[0].cpu().double())
    y, count = whole[1].cpu().double(), len(x)
    mean = [loss(of_all[0], y, 0), loss(of_all[1], y, 1)]
    mean[1] = mean[1] + (of_all[2][:count] - y[:count, 2]).square().mean() / dist.get_world_size()
    fastpcgrad.backward(mean, method=methods.PCGrad("tensorflow"), process_group="local")
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad.cpu().double(), q.grad, rtol=1e-5, atol=1e-5)
    assert report.tasks == (0, 1)


def losses_of(net):
    x, y = own(0)
    return [loss(output, y, t) for t, output in enumerate(net(x))]


@scenario
def what_is_sent_is_one_reduction_a_task_and_the_merged_gradient():
    """(T + 1)·N·(p − 1)/p and what pads the buckets, besides 8 T² bytes and a byte for each task and parameter."""
    net = ddp(Net().to(DEVICE))
    parameters, p = list(net.parameters()), dist.get_world_size()
    surgery = fastpcgrad.GradientSurgery(parameters, TASKS, methods.PCGrad("tensorflow"))
    surgery.backward(losses_of(net))
    elements = sum(q.numel() for q in parameters)
    step = Step("data", p, TASKS, elements, len(parameters))
    assert surgery._layouts.current.exchange.nbytes == step.sent
    padded = elements + -(-4 * elements // buckets.NBYTES) * p
    assert step.sent - step.messages <= 4 * (TASKS + 1) * padded * (p - 1) / p
    assert step.messages <= 8 * (3 * TASKS**2 + TASKS) + TASKS * len(parameters) + 40 * (2 * TASKS + 2)


def planned_and_taken(net, new, merged, step, largest, measured=None):
    """Of ``measured``, or ``merged``, with a new surgery, after one that has warmed up. The plan is the cost model's.

    Args:
        step: of the cost model.
        largest: elements of the largest parameter, which the plan has besides.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "NBYTES", 1 << 20)
        merged(new())
        net.zero_grad()
        dist.barrier()  # what was sent is no longer held
        surgery = new()
        plan = surgery.memory_plan().device
        taken = most_memory(lambda: (measured or merged)(surgery))
        assert abs(plan.total - (step.memory + 4 * largest)) < 0.01 * plan.total
    return plan, taken


@scenario
def memory_is_that_of_the_plan():
    """T·N/p + N + 3 buckets, and a gradient of one layer in the order of its memory."""
    tasks, width = 4, 512
    net = nn.Sequential(*(nn.Linear(width, width, bias=False, device=DEVICE) for _ in range(12)))
    wrapped = ddp(net)
    x, elements, size = torch.ones(2, width, device=DEVICE), 12 * width**2, dist.get_world_size()

    def new():
        return fastpcgrad.GradientSurgery(net.parameters(), tasks, methods.UPGrad())

    def merged(surgery):
        output = wrapped(x)
        surgery.backward([(t + 1) * output.square().mean() for t in range(tasks)])

    plan, taken = planned_and_taken(net, new, merged, Step("data", size, tasks, elements), largest=width**2)
    assert plan.total <= 4 * (elements * (tasks / size + 1) + width**2) + (3 << 20), plan
    assert 0.9 * plan.total <= taken <= 1.1 * plan.total, (taken, plan)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, TASKS))

    def forward(self, x):
        return self.layers(x).unbind(dim=1)


@scenario
def buffers_are_those_of_plain_training():
    nets = [Normed().to(DEVICE) for _ in range(2)]
    wrapped = [ddp(net) for net in nets]
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(nets[0].parameters(), lr=0.0))
    for step in range(3):
        x, y = own(step)
        optimizer.pc_backward([loss(output, y, t) for t, output in enumerate(wrapped[0](x))])
        sum(loss(output, y, t) for t, output in enumerate(wrapped[1](x))).backward()
    assert all(map(torch.equal, nets[0].buffers(), nets[1].buffers()))
