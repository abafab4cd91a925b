"""Data parallelism: gradients that leave while their backward pass runs give the bits of such that wait for its end."""

import contextlib
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.distributed import buckets, exchange
from fastpcgrad.distributed.exchange import Rounds
from fastpcgrad.distributed.links import Link
from tests.distributed.ranks import DEVICE
from tests.distributed.replicated import ddp, in_small_buckets
from tests.distributed.scenarios import Scenarios
from tests.distributed.sharded import assert_alike

SCENARIOS = Scenarios(in_small_buckets)
scenario, each = SCENARIOS.one, SCENARIOS.each
WIDTH, DEPTH, TASKS, ROUNDS = 8, 6, 2, 3
OF_LOSSES = "auto" if DEVICE == "cpu" else True
"""What it takes for passes that the surgery runs."""


class Net(nn.Module):
    """Of some ten buckets. Of its two branches one process runs first the one, the others the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(TASKS))
        self.to(DEVICE)

    def forward(self, x, task, around=lambda layer, z: layer(z), skipped=(), all_heads=False):
        for place, layer in enumerate(self.trunk):
            x = x if place in skipped else around(layer, x).tanh()
        order = (0, 1) if dist.get_rank() == 0 else (1, 0)
        branches = {place: x if DEPTH + place in skipped else around(self.branches[place], x) for place in order}
        outputs = {t: self.heads[t](branches[0] + branches[1]) for t in (range(TASKS) if all_heads else [task])}
        return outputs[task].square().mean() + 0 * sum(output.sum() for output in outputs.values())


def batch(step):
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + dist.get_rank())).to(DEVICE)


@contextlib.contextmanager
def events():
    """What is sent, and where all meet, in order."""
    found = []
    scatter_sum, arrive = Link.scatter_sum, Rounds.arrive

    def sent(self, *arguments):
        found.append("sent")
        return scatter_sum(self, *arguments)

    def arrived(self, point, *arguments, **options):
        found.append(point)
        return arrive(self, point, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "scatter_sum", sent)
        patch.setattr(Rounds, "arrive", arrived)
        yield found


def of_tasks(found):
    """Of each task how many buckets were sent before it was closed, and how many in all."""
    tasks = []
    for event in found:
        if event == "task":
            tasks.append([0, 0])
            closed = False
        elif event == "end of task":
            closed = True
        elif event == "sent":
            tasks[-1][1] += 1
            tasks[-1][0] += not closed
    return tasks


def losses(surgery, net, step, **options):
    return surgery.backward([lambda t=t: net(batch(step), t, **options) for t in range(TASKS)])


def own_passes(surgery, net, step, passes=1, after=lambda net: None, sync=False, **options):
    for t in range(TASKS):
        with surgery.task(t), contextlib.nullcontext() if sync else net.no_sync():
            for number in range(passes):
                net(batch(step + 7 * number), t, **options).backward()
            after(net)
    return surgery.merge()


def compared(call, overlap=True, wrap=ddp, count=ROUNDS):
    """Rounds whose gradients leave ahead, if that may be, beside such that wait, which have the same bits.

    Returns:
        of each task of the former how many buckets left ahead, and how many in all; and how many there are.
    """
    nets = [wrap(Net()) for _ in range(2)]
    surgeries = [
        fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.PCGrad("tensorflow"), overlap=choice)
        for net, choice in zip(nets, (overlap, False), strict=True)
    ]
    with events() as found:
        for step in range(count):
            call(surgeries[0], nets[0], step)
    with events() as others:
        for step in range(count):
            call(surgeries[1], nets[1], step)
            if step == count - 1:
                for p, q in zip(*(net.parameters() for net in nets), strict=True):
                    assert (p.grad is None) == (q.grad is None)
                    assert p.grad is None or torch.equal(p.grad, q.grad)
    turns = surgeries[1]._layouts.current.capture.rows.turns
    assert all(task == [0, turns] for task in of_tasks(others))
    return of_tasks(found), turns


@each(losses=(OF_LOSSES, losses), own_passes=(True, own_passes))
def a_bucket_leaves_before_the_last_gradient_is_there(case):
    overlap, call = case
    net = ddp(Net())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, overlap=overlap)
    call(surgery, net, 0)  # in which it is found what each task touches
    with events() as found:
        net.module.trunk[0].weight.register_hook(lambda grad: found.append("last gradient"))
        call(surgery, net, 1)
    for _ in range(TASKS):
        assert found.index("sent") < found.index("last gradient") < found.index("end of task"), found
        del found[: found.index("end of task") + 1]


@scenario
def room_is_used_again_within_a_backward_pass():
    """As soon as the first bucket has arrived, which is waited for here: its time is not known. All begin with it; to
    wait for another one would be to wait for a process that may not send it before all meet."""
    net = ddp(Net())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, overlap=OF_LOSSES)
    losses(surgery, net, 0)
    rows = surgery._layouts.current.capture.rows
    [vector] = rows._vectors

    def wait(grad):
        while rows.begun <= buckets.IN_FLIGHT and not vector.buckets._on_their_way[0][0].is_completed():
            time.sleep(0.001)

    net.module.trunk[1].weight.register_hook(wait)
    with events() as found:
        losses(surgery, net, 1)
    assert all(ahead > buckets.IN_FLIGHT for ahead, _ in of_tasks(found)), found


@contextlib.contextmanager
def room_for_all():
    """However slow the others are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "IN_FLIGHT", 100)
        yield


@each(losses=(OF_LOSSES, losses), own_passes=(True, own_passes))
def all_buckets_leave_ahead_once(case):
    """When it is known what a task touches."""
    overlap, call = case
    with room_for_all():
        tasks, count = compared(call, overlap)
    assert all(sent == count for _, sent in tasks)
    assert all(ahead == count for ahead, _ in tasks[TASKS:]), tasks


@each(auto="auto", never=False)
def own_passes_wait_unless_it_is_asked_for(overlap):
    tasks, count = compared(own_passes, overlap)
    assert all(task == [0, count] for task in tasks)


def sent_again(tasks, count):
    """Of each task whether it was sent a second time, as all of it or what had left."""
    return [sent > count for _, sent in tasks]


def clipped(net):
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)


def replaced(net):
    for p in net.parameters():
        p.grad = None if p.grad is None else p.grad.sign()


CHANGES = {
    "a second pass": {"passes": 2},
    "clipped": {"after": clipped},
    "replaced": {"after": replaced},
    "in one process": {"after": lambda net: clipped(net) if dist.get_rank() else None},
}


@each(**CHANGES)
def gradients_that_change_after_they_have_left_are_sent_again(options):
    """Until it is known that they do: then they wait for the end of their task."""
    with room_for_all():
        tasks, count = compared(lambda *call: own_passes(*call, **options), count=4)
    again = sent_again(tasks, count)
    assert any(again[: 2 * TASKS]) and not any(again[2 * TASKS :]), tasks


def a_later_hook(net, task, step):
    """Doubles a gradient after all have seen it."""
    weight = net.module.trunk[-1].weight

    def double(parameter):
        parameter.grad.mul_(2)

    handle = weight.register_post_accumulate_grad_hook(double)
    net(batch(step), task).backward()
    handle.remove()


@scenario
def a_hook_that_comes_later_counts():
    def call(surgery, net, step):
        for t in range(TASKS):
            with surgery.task(t), net.no_sync():
                a_later_hook(net, t, step)
        return surgery.merge()

    with room_for_all():
        compared(call)


@each(
    synced={},
    view={"gradient_as_bucket_view": True},
    unused={"find_unused_parameters": True},
    static={"static_graph": True},
)
def modules_that_average_themselves_are_waited_for(options):
    """Their collectives and ours would be the same gradients on their way twice."""
    tasks, count = compared(
        lambda *given: own_passes(*given, sync=True, all_heads=True), wrap=lambda net: ddp(net, **options)
    )
    assert all(task == [0, count] for task in tasks)


@scenario
def gradients_that_a_module_averages_unnoticed_are_sent_again():
    """Two forward passes, of which the first has prepared to average, and the second says that none has."""

    def call(surgery, net, step):
        for t in range(TASKS):
            with surgery.task(t):
                loss = net(batch(step), t)
                with net.no_sync():
                    (loss + net(batch(step + 1), t)).backward()
        return surgery.merge()

    with room_for_all():
        compared(call, wrap=lambda net: ddp(net, find_unused_parameters=True))


@each(losses=(OF_LOSSES, losses), own_passes=(True, own_passes))
def a_process_may_lack_the_gradients_of_whole_buckets(case):
    """Other ones in each round, so that some come that nobody waits for."""
    overlap, call = case

    def skipping(surgery, net, step):
        skipped = (2, 3) if dist.get_rank() == step % dist.get_world_size() else ()
        return call(surgery, net, step, skipped=skipped)

    with room_for_all():
        tasks, count = compared(skipping, overlap, count=4)
    assert all(ahead for ahead, _ in tasks[TASKS:])
    assert any(sent_again(tasks, count)) == (dist.get_world_size() > 1)


def checkpointed(reentrant):
    return lambda layer, z: checkpoint(layer, z, use_reentrant=reentrant)


@each(
    losses=(OF_LOSSES, losses, False),
    own_passes=(True, own_passes, False),
    reentrant=(True, own_passes, True),
)
def checkpoints(case):
    overlap, call, reentrant = case
    with room_for_all():
        tasks, count = compared(lambda *given: call(*given, around=checkpointed(reentrant)), overlap)
    assert not any(sent_again(tasks, count))
    if not reentrant:  # without gradients at its input a reentrant one has none
        assert all(ahead == count for ahead, _ in tasks[TASKS:]), tasks


@scenario
def tied_layers():
    """In reentrant checkpoints each use is a backward pass of its own."""

    def tied(net):
        net.trunk[1] = net.trunk[4]
        return ddp(net)

    def call(surgery, net, step):
        return own_passes(surgery, net, step, around=lambda layer, z: checkpointed(True)(layer, z.requires_grad_()))

    with room_for_all():
        compared(call, wrap=tied)


class Reduced(torch.autograd.Function):
    """What sends something through the module's own group in its backward pass, as SyncBatchNorm does."""

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        total = grad.sum().clone()
        dist.all_reduce(total)
        return grad + total


@each(losses=(OF_LOSSES, losses), own_passes=(True, own_passes))
def collectives_of_the_model_do_not_come_in_between(case):
    """Before one in the first process buckets leave, which in the others wait for a gradient that does not come."""
    overlap, call = case

    def reducing(surgery, net, step):
        early = net.module.trunk[1]
        return call(
            surgery,
            net,
            step,
            around=lambda layer, z: Reduced.apply(layer(z)) if layer is early else layer(z),
            skipped=(DEPTH, DEPTH + 1) if step and dist.get_rank() else (),
        )

    compared(reducing, overlap)


@scenario
def a_task_that_is_entered_again_waits_for_its_end():
    def call(surgery, net, step):
        for t in range(TASKS):
            for number in range(2):
                with surgery.task(t), net.no_sync():
                    net(batch(step + 7 * number), t).backward()
        return surgery.merge()

    with room_for_all():
        tasks, count = compared(call)
    assert tasks[2 * TASKS :: 2] == [[count, count]] * TASKS * (ROUNDS - 1)
    assert tasks[1::2] == [[0, count]] * TASKS * ROUNDS


@scenario
def parameters_of_two_dtypes_leave_in_one_order():
    def double(net):
        net.branches[0].double()
        net.trunk[2].double()
        return ddp(net)

    def around(layer, z):
        return layer(z.to(layer.weight.dtype)).float()

    def call(surgery, net, step):
        return losses(surgery, net, step, around=around)

    with room_for_all():
        tasks, count = compared(call, OF_LOSSES, wrap=double)
    assert tasks[TASKS:] == [[count, count]] * TASKS * (ROUNDS - 1), tasks


@scenario
def a_function_that_is_absent_in_one_process_ends_the_round_everywhere():
    net = ddp(Net())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.PCGrad("tensorflow"), overlap=OF_LOSSES)
    losses(surgery, net, 0)
    with pytest.raises(exchange.OutOfStep, match="None for the same losses"):
        surgery.backward([lambda t=t: None if t == dist.get_rank() == 0 else net(batch(1), t) for t in range(TASKS)])
    surgery.backward([lambda t=t: net(batch(1), t) if t else None for t in range(TASKS)])
    losses(surgery, net, 2)
    assert_alike([p.grad for p in net.parameters()])


class Fault(Exception):
    pass


def ended(surgery, net, step, call, error, at):
    """A round in which the last process is stopped, at a gradient of the second task; the others hear of it."""
    passes = []

    def stop(grad):
        passes.append(1)
        if len(passes) == TASKS:
            raise error

    last = dist.get_world_size() - 1
    handle = at(net).register_hook(stop if dist.get_rank() == last else lambda grad: None)
    with pytest.raises(error if dist.get_rank() == last else exchange.OutOfStep):
        call(surgery, net, step)
        assert dist.get_rank() == last, "goes on"
    handle.remove()


@each(losses=(OF_LOSSES, losses), own_passes=(True, own_passes))
def a_process_that_fails_in_a_backward_pass_ends_the_round_everywhere(case):
    """Others are further than it is, or not as far; and none waits for what another never begins."""
    overlap, call = case

    def failing(surgery, net, step):
        if step % 2:
            for at in (lambda net: net.module.trunk[0].weight, lambda net: net.module.trunk[-2].weight):
                ended(surgery, net, step, call, Fault, at)
                assert all(p.grad is None for p in net.parameters())
        return call(surgery, net, step)

    for context in (contextlib.nullcontext, room_for_all):
        with context():
            nets = [ddp(Net()) for _ in range(2)]
            surgeries = [
                fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.PCGrad("tensorflow"), overlap=choice)
                for net, choice in zip(nets, (overlap, False), strict=True)
            ]
            for step in range(ROUNDS):
                failing(surgeries[0], nets[0], step)
                call(surgeries[1], nets[1], step)
                for p, q in zip(*(net.parameters() for net in nets), strict=True):
                    assert torch.equal(p.grad, q.grad)


@scenario
def a_process_of_whose_failure_the_others_hear_late_has_the_next_round_right():
    net = ddp(Net())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.PCGrad("tensorflow"), overlap=OF_LOSSES)
    losses(surgery, net, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "PATIENCE", timedelta(milliseconds=1))
        slow = dist.get_rank() < dist.get_world_size() - 1
        handle = net.module.trunk[2].weight.register_hook(lambda grad: time.sleep(0.1) if slow else None)
        ended(surgery, net, 1, losses, Fault, lambda net: net.module.trunk[3].weight)
        handle.remove()
        losses(surgery, net, 2)
    assert_alike([p.grad for p in net.parameters()])


@scenario
def after_an_interrupt_in_each_process_at_another_gradient_the_next_round_is_right():
    net = ddp(Net())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.PCGrad("tensorflow"), overlap=OF_LOSSES)
    losses(surgery, net, 0)
    passes = []

    def interrupt(grad):
        passes.append(1)
        if len(passes) == TASKS:
            raise KeyboardInterrupt

    handle = net.module.trunk[dist.get_rank()].weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        losses(surgery, net, 1)
    handle.remove()
    losses(surgery, net, 2)
    assert_alike([p.grad for p in net.parameters()])


@scenario
def processes_that_do_not_choose_alike_are_told():
    net = ddp(Net())
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, overlap=OF_LOSSES if dist.get_rank() else False)
    with pytest.raises(exchange.OutOfStep, match="have the same overlap"):
        losses(surgery, net, 0)


@scenario
def what_is_chosen_is_one_of_three():
    with pytest.raises(ValueError, match="overlap must be True, False or 'auto'; found 'yes'"):
        fastpcgrad.GradientSurgery(Net().parameters(), TASKS, overlap="yes")
