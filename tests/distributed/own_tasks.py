"""Task parallelism: tasks that processes share out among them are merged as one process would that runs them all."""

import random

import pytest
import torch
import torch._dynamo  # which FSDP would otherwise import in each rank
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import fully_shard

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.distributed import buckets, exchange
from fastpcgrad.distributed.cost import Step
from tests.distributed.ranks import DEVICE
from tests.distributed.replicated import Normed, ddp, in_small_buckets, ordinary_steps_are_right, planned_and_taken
from tests.distributed.scenarios import Scenarios
from tests.distributed.sharded import (
    METHODS,
    STEPS,
    TASKS,
    Net,
    Twin,
    assert_alike,
    assert_right,
    data,
    exact_rows,
    loss,
    mesh,
    trunk_or_auto,
    wholes,
)

SCENARIOS = Scenarios(in_small_buckets)
scenario, each = SCENARIOS.one, SCENARIOS.each


def round_robin(step):
    """For each process its tasks: with two processes one has two, with four one has none."""
    return [[t for t in range(TASKS) if t % dist.get_world_size() == rank] for rank in range(dist.get_world_size())]


def in_groups(step):
    """One task each, which with four processes two share."""
    return [[rank % TASKS] for rank in range(dist.get_world_size())]


def at_random(step):
    """Some tasks are nobody's, some are entered by several, and by one of them twice."""
    generator = random.Random(step)
    found = [generator.choices(range(TASKS), k=generator.randrange(3)) for _ in range(dist.get_world_size())]
    return found if any(found) else round_robin(step)


def by_itself(surgery, net, batches):
    for t, (x, y) in batches:
        with surgery.task(t):
            loss(net(x, t), y, t).backward()
    return surgery.merge()


def by_functions(surgery, net, batches):
    functions = {t: lambda t=t, x=x, y=y: loss(net(x, t), y, t) for t, (x, y) in batches}
    return surgery.backward(list(map(functions.get, range(TASKS))))


def by_losses(surgery, net, batches):
    losses = {t: loss(net(x)[t], y, t) for t, (x, y) in batches}
    return surgery.backward(list(map(losses.get, range(TASKS))))


def batch_of(step, rank, number):
    return data(100 * step + 10 * rank + number, 1)


def mean_rows(parameters, step, assigned):
    """In float64, of each task over all that is anybody's."""
    found = {}
    for rank, tasks in enumerate(assigned):
        for number, t in enumerate(tasks):
            found.setdefault(t, []).append(exact_rows(wholes(parameters), *batch_of(step, rank, number))[t])
    empty = [[None] * len(parameters)]
    return [list(map(mean, zip(*found.get(t, empty), strict=True))) for t in range(TASKS)]


def mean(grads):
    return None if grads[0] is None else sum(grads) / len(grads)


def train(wrap, method, assign, call=by_itself, unit=1e-6, **options):
    """Three steps, each compared with one process that runs all tasks."""
    net = Net().to(DEVICE)
    wrapped, parameters = wrap(net), list(net.parameters())
    chosen = {name: make(parameters) if callable(make) else make for name, make in options.items()}
    surgery = fastpcgrad.GradientSurgery(parameters, TASKS, method(), parallel="task", accumulate="mean", **chosen)
    options.pop("row_dtype", None)
    optimizer, twin = torch.optim.SGD(parameters, lr=0.05), Twin(method(), **options)
    for step in range(STEPS):
        assigned, own = assign(step), dist.get_rank()
        batches = [(t, batch_of(step, own, number)) for number, t in enumerate(assigned[own])]
        rows = mean_rows(parameters, step, assigned)
        expected, right = twin.merged(rows, sorted({t for tasks in assigned for t in tasks}))
        report = call(surgery, wrapped, batches)
        assert report.tasks == right.tasks
        assert_right(parameters, expected, rows, right, unit)
        assert_alike([report.gram, report.weights.nan_to_num()])
        optimizer.step()
    assert_alike(wholes(parameters))
    if wrapped is not net:
        ordinary_steps_are_right(wrapped, parameters)
    return surgery


def alone(net):
    return net


@each(**METHODS)
def losses_of_one_forward(method):
    if dist.get_world_size() == 2:
        train(alone, method, round_robin, by_losses)


def composed(net):
    replicate(net)(data(0, 1)[0])  # which makes its module, together with all others
    return net


@each(groups=in_groups, random=at_random)
def any_assignment(assign):
    for name in ("tensorflow", "paper", "NashMTL"):
        train(alone, METHODS[name], assign)


@each(
    ddp=lambda net: ddp(net, find_unused_parameters=True),
    view=lambda net: ddp(net, find_unused_parameters=True, gradient_as_bucket_view=True),
    composed=composed,
)
def a_model_that_averages_in_ordinary_steps(wrap):
    if wrap is not composed:
        train(wrap, METHODS["tensorflow"], round_robin, by_itself)
    train(wrap, METHODS["tensorflow"], round_robin, by_losses)
    train(wrap, METHODS["tensorflow"], in_groups, by_functions)


@each(
    shared={"shared": lambda ps: ps[:2]},
    auto={"shared": trunk_or_auto},
    gram_over={"gram_over": lambda ps: ps[:6]},
    parameter={"granularity": "parameter"},
    bf16={"row_dtype": torch.bfloat16},
)
def choices_of_a_surgery(options):
    unit = 4e-3 if "row_dtype" in options else 1e-6
    assign = round_robin if options.get("shared") is trunk_or_auto else in_groups  # all tasks in the first round
    train(alone, METHODS["tensorflow"], assign, unit=unit, **options)


@scenario
def the_drop_in_takes_none_for_the_tasks_of_others():
    """Orders are drawn from generators that are not alike, and a process whose list is all None has a part too."""
    net = Net().to(DEVICE)
    generator = random.Random(dist.get_rank())
    optimizer = fastpcgrad.PCGrad(
        torch.optim.SGD(net.parameters(), lr=0.05), variant="paper", generator=generator, parallel="task"
    )
    for step in range(STEPS):
        own = [None, None, None] if dist.get_rank() else [loss(o, y, t) for t, (o, y) in enumerate(outputs(net, step))]
        optimizer.pc_backward(own)
        assert optimizer.report.tasks == (0, 1, 2)
        optimizer.step()
        assert_alike(wholes(net.parameters()))


def outputs(net, step):
    x, y = data(step, 1)
    return [(output, y) for output in net(x)]


def merged(net, accumulate, stays):
    """What one surgery makes of this process' stays: tasks, and the loss that each adds, times a factor."""
    for p in net.parameters():
        p.grad = None
    surgery = fastpcgrad.GradientSurgery(net.parameters(), 2, methods.Sum(), parallel="task", accumulate=accumulate)
    x, y = data(0, 1)
    for t, factor in stays:
        with surgery.task(t):
            (factor * loss(net(x, t), y, t)).backward()
    surgery.merge()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@each(sum=1, mean=2)
def stays_of_a_task_add_up_or_are_averaged_wherever_they_were(times):
    """The last process enters task 1 twice, the others once, with twice the loss where that is the same in the end."""
    net, size = Net().to(DEVICE), dist.get_world_size()
    last = dist.get_rank() == size - 1
    found = merged(net, "mean" if times == 2 else "sum", [(0, 1.0)] + [(1, 1.0)] * (2 if last else 1))
    total = size + 1 if times == 2 else size
    right = merged(net, "sum", [(0, 1.0), (1, (size + 1) / total)])
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


class Fault(Exception):
    pass


@scenario
def a_process_that_fails_ends_the_round_everywhere():
    net, last = Net().to(DEVICE), dist.get_world_size() - 1
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.UPGrad(), parallel="task")

    def failing(step, fails):
        x, y = data(step, 1)
        for t in round_robin(step)[dist.get_rank()] or (TASKS - 1,):
            with surgery.task(t):
                loss(net(x, t), y, t).backward()
                if fails and dist.get_rank() == last:
                    raise Fault
        return surgery.merge()

    def not_scalar(step, fails):
        return surgery.backward(net(data(step, 1)[0]) if dist.get_rank() == last else [None] * TASKS)

    for step, call in enumerate((failing, failing, not_scalar)):
        own = (ValueError, "scalar") if call is not_scalar else (Fault, "$")
        error, words = own if dist.get_rank() == last else (exchange.OutOfStep, f"process {last} has failed")
        with pytest.raises(error, match=words):
            call(step, True)
        assert all(p.grad is None for p in net.parameters())
    failing(2, False)
    assert_alike([p.grad for p in net.parameters()])


@scenario
def processes_whose_surgeries_are_not_alike_are_told():
    net = Net().to(DEVICE)
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS + dist.get_rank() % 2, parallel="task")
    with pytest.raises(exchange.OutOfStep, match=r"merge\(\) of tasks 0 to "):
        surgery.merge()
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, parallel="task")
    with pytest.raises(RuntimeError, match="no task"):
        surgery.merge()
    other = Net().to(DEVICE)
    with torch.no_grad():
        other.b.weight[3, 2] += 1e-3 * dist.get_rank()
    surgery = fastpcgrad.GradientSurgery(other.parameters(), TASKS, parallel="task")
    with pytest.raises(RuntimeError, match="other parameters each"):
        surgery.backward([loss(output, y, t) for t, (output, y) in enumerate(outputs(other, 0))])
    assert all(p.grad is None for p in other.parameters())


@scenario
def what_is_sent_is_the_rows_of_a_process_and_the_merged_gradient():
    """(k + 1)·N·(p − 1)/p for k tasks and what pads the buckets, besides counts, 8 T² bytes and presence."""
    net, p = Net().to(DEVICE), dist.get_world_size()
    parameters = list(net.parameters())
    surgery = fastpcgrad.GradientSurgery(parameters, TASKS, methods.PCGrad("tensorflow"), parallel="task")
    tasks = round_robin(0)[dist.get_rank()]
    surgery.backward([loss(net(x)[t], y, t) if t in tasks else None for t, (x, y) in enumerate([data(0, 1)] * TASKS)])
    elements = sum(q.numel() for q in parameters)
    step = Step("task", p, TASKS, elements, len(parameters))
    fewer = (step.passes - len(tasks)) * step.vector  # than the process that has most
    assert surgery._layouts.current.exchange.nbytes == step.sent - fewer
    padded = elements + -(-4 * elements // buckets.NBYTES) * p
    assert step.sent - step.messages <= 4 * (-(-TASKS // p) + 1) * padded * (p - 1) / p


@scenario
def memory_is_that_of_the_plan():
    """The rows of a process, as many shards as are begun before the first of them is gone, and 4 buckets."""
    tasks, width = 4, 512
    net = nn.Sequential(*(nn.Linear(width, width, bias=False, device=DEVICE) for _ in range(12)))
    x, elements, size = torch.ones(2, width, device=DEVICE), 12 * width**2, dist.get_world_size()

    def new():
        return fastpcgrad.GradientSurgery(net.parameters(), tasks, methods.UPGrad(), parallel="task")

    def merged(surgery):
        for t in range(dist.get_rank(), tasks, size):
            with surgery.task(t):
                ((t + 1) * net(x).square().mean()).backward()
        surgery.merge()

    def twice(surgery):
        """What a round keeps is there beside the rows of the next."""
        merged(surgery)
        net.zero_grad()
        merged(surgery)

    step = Step("task", size, tasks, elements)
    plan, taken = planned_and_taken(net, new, merged, step, largest=width**2, measured=twice)
    held = -(-tasks // size)
    assert plan.total <= 4 * (elements * (held + min(tasks, size) / size) + width**2) + (5 << 20), plan
    assert taken <= 1.1 * plan.total, (taken, plan)
    if dist.get_rank() == 0:  # others have fewer tasks
        assert taken >= 0.9 * plan.total, (taken, plan)


@scenario
def buffers_are_not_sent_by_forward_passes_that_others_do_not_run():
    wrapped = ddp(Normed().to(DEVICE))
    surgery = fastpcgrad.GradientSurgery(wrapped.parameters(), TASKS, parallel="task")
    x, y = data(0, 1)
    for _ in range(2):
        for t in range(TASKS) if dist.get_rank() == 1 else ():
            with surgery.task(t):
                loss(wrapped(x)[t], y, t).backward()
        surgery.merge()
    wrapped(x)  # an ordinary one
    assert_alike(list(wrapped.buffers()))


@each(ddp=ddp, composed=composed)
def gradients_that_were_averaged_over_other_tasks_are_refused(wrap):
    net = wrap(Net().to(DEVICE))
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, parallel="task")
    x, y = data(0, 1)
    found, own = [loss(output, y, t) for t, output in enumerate(net(x))], dist.get_rank() % TASKS
    with pytest.raises(RuntimeError, match="may have averaged this task's gradients"), surgery.task(own):
        (found[own] + 0 * sum(found)).backward()
    assert all(p.grad is None for p in net.parameters())


@scenario
def what_is_not_covered_is_refused_by_name():
    net = fully_shard(Net().to(DEVICE), mesh=mesh())
    x, y = data(0, 1)

    def refused(make, *words, error=NotImplementedError):
        with pytest.raises(error) as caught:
            make()
        assert all(word in str(caught.value) for word in words), caught.value

    refused(lambda: in_task(net.parameters()), "DTensors", "parallel='data'")
    static = ddp(Net().to(DEVICE), static_graph=True)
    refused(lambda: in_task(static.parameters()), "static_graph=False")
    plain = Net().to(DEVICE)
    refused(lambda: in_task(plain.parameters(), accumulate_dtype=torch.float64), "accumulate_dtype")
    surgery = fastpcgrad.GradientSurgery(plain.parameters(), TASKS, parallel="task")
    losses = [loss(output, y, t) for t, output in enumerate(plain(x))]
    refused(lambda: surgery.backward(losses, two_phase=True), "two_phase")
    report = surgery.backward(losses)
    assert "several processes" in str(report.rows) or not report.rows.factored
    for wrong in ({"parallel": "pipeline"}, {"parallel": "task", "process_group": "local"}):
        refused(lambda wrong=wrong: in_task(plain.parameters(), **wrong), "parallel", error=ValueError)


def in_task(parameters, **options):
    with fastpcgrad.GradientSurgery(parameters, TASKS, **{"parallel": "task", **options}).task(0):
        pass
