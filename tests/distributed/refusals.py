"""Two processes: what is refused there and what is not, and that an ordinary step afterwards is right either way."""

import contextlib
import gc
import warnings
from collections.abc import Callable

import pytest
import torch
import torch._dynamo  # which FSDP would otherwise import in each rank
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate as replicate_with_fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastpcgrad
from fastpcgrad import FastPCGradWarning, _warnings, balancing, methods, reference
from fastpcgrad.distributed import processes
from fastpcgrad.distributed.groups import Processes

TASKS, BATCH = 3, 4
SCENARIOS: dict[str, Callable[[], None]] = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def each(**cases):
    """A scenario for each case, with it as argument."""

    def register(function):
        for name, case in cases.items():
            SCENARIOS[f"{function.__name__} ({name})"] = lambda case=case: function(case)
        return function

    return register


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


@each(
    resharding=lambda: sharded(True),
    keeping=lambda: sharded(False),
    whole_model=lambda: sharded(True, layers=False),
    replicating=lambda: replicate_with_fsdp(Net(), mesh=mesh()),
)
def fully_sharded_parameters_are_refused_where_no_backward_pass_would_reduce_them(make):
    net = make()
    parameters = list(net.parameters())
    for choice in ("auto", "local"):
        Processes(choice).check(parameters)
        for door in doors(net, parameters, own_batch(), choice).values():
            assert_refused(door, parameters, "surgery.task(t)", "found a")
            assert_ordinary_steps_are_right(net, parameters)
        # Between forward and backward the module's own parameters may be the gathered ones.
        left = losses(net, *own_batch())
        seen = list(net.parameters())
        if not all(isinstance(p, DTensor) for p in seen):
            assert_refused(
                lambda c=choice, s=seen: Processes(c).check(s), parameters, "fully_shard", "before its forward"
            )
        sum(left).backward()
        assert_ordinary_steps_are_right(net, parameters)


@scenario
def gathered_parameters_are_refused_by_the_name_of_who_gathers():
    net = sharded(True)
    parameters = list(net.parameters())
    assert_refused(doors(net, parameters, own_batch())["backward"], parameters, "fully_shard")
    assert_ordinary_steps_are_right(net, parameters)


@scenario
def shared_features_refuse_a_trunk_that_is_fully_sharded():
    for choice in ("auto", "local"):
        net = Net(lambda z, c=choice: fastpcgrad.shared_features(z, TASKS, fixed_order(), process_group=c))
        fully_shard(net.trunk, mesh=mesh())
        parameters = list(net.parameters())
        assert_refused(lambda n=net: n(own_batch()[0]), parameters, "fully_shard")
        net.between = None
        # The head is nobody's: each process has its own gradient there.
        sum(losses(net, *batch())).backward()
        assert_grads(parameters, [sum(column) for column in zip(*rows(*batch()), strict=True)])


@each(auto="auto", local="local")
def tensor_parallel_parameters_are_refused_by_functions_with_their_placements(choice):
    net = Net()
    parallelize_module(net, mesh(), {"trunk.0": ColwiseParallel(output_layouts=Replicate())})
    parameters, data = list(net.parameters()), batch()
    words = ("DTensor [8, 6]", "Shard(dim=0)", "DeviceMesh")
    Processes(choice).check(parameters)
    for door in doors(net, parameters, data, choice).values():
        assert_refused(door, parameters, *words)
        assert_ordinary_steps_are_right(net, parameters, data)
    net.between = lambda z: fastpcgrad.shared_features(z, TASKS, fixed_order(), process_group=choice)
    assert_refused(lambda: net(data[0]), parameters, "DTensor", "Shard(dim=0)", "DeviceMesh")
    net.between = None
    assert_ordinary_steps_are_right(net, parameters, data)


@each(flat=False, original=True)
def parameters_of_the_first_fsdp_are_refused(use_orig_params):
    wrapped = FullyShardedDataParallel(Net(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    parameters = list(wrapped.parameters())
    right = None
    for choice in ("auto", "local"):
        assert_refused(lambda c=choice: Processes(c).check(parameters), parameters, "FullyShardedDataParallel")
        for name, door in doors(wrapped, parameters, own_batch(), choice).items():
            if name != "backward with inputs" and name != "grad":  # after its forward these are no graph's leaves
                assert_refused(door, parameters, "FullyShardedDataParallel")
            wrapped.zero_grad()
            sum(losses(wrapped, *own_batch())).backward()
            found = [None if p.grad is None else p.grad.clone() for p in parameters]
            right = right or found
            for f, r in zip(found, right, strict=True):
                assert (f is None) == (r is None)
                assert f is None or torch.equal(f, r)


CONFIGURATIONS = {
    "default": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
}


@scenario
def what_ddp_makes_of_dtensors_is_refused():
    net = Net()
    plane = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    parallelize_module(net, plane["tensor"], {"trunk.0": ColwiseParallel(output_layouts=Replicate())})
    wrapped = DistributedDataParallel(net, device_mesh=plane["data"])
    parameters = list(net.parameters())  # later forward passes leave others in the module
    for choice in ("auto", "local"):
        own = Processes(choice)
        assert_refused(lambda o=own: o.check(parameters), parameters, "local part [8, 6] of a DTensor")
        for door in doors(wrapped, parameters, own_batch(), choice).values():
            assert_refused(door, parameters, "local part", "of a DTensor")
            assert_ordinary_steps_are_right(wrapped, parameters)


@each(**{name: kind for name, kind in CONFIGURATIONS.items() if name != "static graph"})
def local_under_ddp_is_the_surgery_of_the_processes_own_batch(configuration):
    net = Net()
    wrapped = DistributedDataParallel(net, **configuration)
    parameters, expected = list(net.parameters()), merged(*own_batch())
    with no_warning():
        for door in ("backward", "backward with inputs"):
            for p in parameters:
                p.grad = None
            doors(wrapped, parameters, own_batch(), "local")[door]()
            assert_grads(parameters, expected)
            assert_ordinary_steps_are_right(wrapped, parameters)
        found = doors(wrapped, parameters, own_batch(), "local")["grad"]()
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    assert_ordinary_steps_are_right(wrapped, parameters)


@scenario
def local_with_a_static_graph_is_refused_where_it_would_never_average_again():
    for name in doors(None, None, own_batch()):
        net = Net()
        wrapped = DistributedDataParallel(net, static_graph=True)
        parameters = list(net.parameters())
        assert_refused(doors(wrapped, parameters, own_batch(), "local")[name], parameters, "static_graph=False")
        assert_ordinary_steps_are_right(wrapped, parameters)


@each(**CONFIGURATIONS)
def one_forward_a_task_under_ddp_is_the_surgery_of_the_averaged_rows_where_local_is_asked_for(configuration):
    """With a bucket view all rows would lie in one bucket, had they not been copied."""
    wrapped = DistributedDataParallel(Net(), **configuration)
    parameters = list(wrapped.parameters())
    calls = rounds(wrapped, parameters, own_batch(), "local")
    everywhere = merged(*batch())
    for _ in range(2):
        for name in ("surgery.task", "surgery.backward of functions"):
            for p in parameters:
                p.grad = None
            calls[name]()
            assert_grads(parameters, everywhere)
    assert_ordinary_steps_are_right(wrapped, parameters)


@each(**CONFIGURATIONS)
def several_losses_of_one_forward_are_refused_also_locally(configuration):
    for name in ("pc_backward", "surgery.backward", "two phases"):
        wrapped = DistributedDataParallel(Net(), **configuration)
        parameters = list(wrapped.parameters())
        call = rounds(wrapped, parameters, own_batch(), "local")[name]
        assert_refused(call, parameters, "several losses", "surgery.task(t)", "no_sync")
        assert_ordinary_steps_are_right(wrapped, parameters)


class Wrapper(DistributedDataParallel):
    """Of a user's own."""


@scenario
def a_subclass_is_known_and_named():
    wrapped = Wrapper(Net())
    parameters = list(wrapped.parameters())
    assert_refused(lambda: Processes("local").check(parameters, moved=True), parameters, "Wrapper averages")
    del wrapped


@scenario
def rows_that_hooks_take_before_ddp_averages_are_refused_also_locally():
    net = Net()
    parameters = list(net.parameters())
    Processes("local").check(parameters, moved=True)
    wrapped = DistributedDataParallel(net)
    assert_refused(
        lambda: Processes("local").check(parameters, moved=True), parameters, "row_dtype", "this process alone"
    )
    Processes("local").check(parameters)
    assert_ordinary_steps_are_right(wrapped, parameters)


@scenario
def several_passes_behind_one_forward_are_refused_unless_nothing_is_averaged():
    net = Net()
    wrapped = DistributedDataParallel(net)
    parameters, own = list(net.parameters()), Processes("local")
    own.check(parameters)
    assert_refused(lambda: own.check_passes(2), parameters, "several losses", "2 processes", "no_sync()")
    own.check_passes(1)
    with wrapped.no_sync():
        own.check_passes(2)
    other = Processes("local")
    other.check(list(Net().parameters()))
    other.check_passes(2)


@scenario
def ddp_over_one_process_is_plain_training():
    groups = [dist.new_group([rank]) for rank in range(2)]
    own = groups[dist.get_rank()]
    net = Net()
    wrapped = DistributedDataParallel(net, process_group=own)
    parameters = list(net.parameters())
    with no_warning(), pytest.warns(FastPCGradWarning, match="each of the 2 processes"):
        fastpcgrad.backward(losses(wrapped, *own_batch()), method=fixed_order())
    assert_grads(parameters, merged(*own_batch()))
    held = list(DistributedDataParallel(Net(), process_group=own, gradient_as_bucket_view=True).parameters())
    Processes().check(held)  # its module is gone
    view = DistributedDataParallel(Net(), process_group=own, gradient_as_bucket_view=True)
    rounds(view, list(view.parameters()), own_batch())["surgery.task"]()
    assert_grads(list(view.parameters()), merged(*own_batch()))


@scenario
def plain_parameters_are_warned_of_once():
    net = Net()
    parameters = list(net.parameters())
    with no_warning():
        with pytest.warns(FastPCGradWarning, match=r"each of the 2 processes.*process_group='local'") as caught:
            fastpcgrad.backward(losses(net, *own_batch()), method=fixed_order())
        assert [warning.filename for warning in caught] == [__file__]
        assert_grads(parameters, merged(*own_batch()))
        fastpcgrad.grad(losses(net, *own_batch()), parameters)
        Processes().check(list(Net().parameters()))
        fastpcgrad.shared_features(net.trunk(own_batch()[0]), TASKS)
    calls = (
        lambda: fastpcgrad.backward(losses(net, *own_batch()), process_group="local"),
        lambda: fastpcgrad.grad(losses(net, *own_batch()), parameters, process_group="local"),
        lambda: Processes("local").check(parameters),
        lambda: fastpcgrad.shared_features(net.trunk(own_batch()[0]), TASKS, process_group="local"),
    )
    for call in calls:
        with no_warning():
            call()


@each(
    shared_features=lambda net, x: fastpcgrad.shared_features(net.trunk(x), TASKS),
    check=lambda net, x: Processes().check(list(net.parameters())),
    gradnorm=lambda net, x: balancing.GradNorm(TASKS, 0.5).note_gradients(losses(net, *own_batch()), net.trunk[2]),
)
def each_door_warns_of_plain_parameters(call):
    net = Net()
    with no_warning(), pytest.warns(FastPCGradWarning, match="each of the 2 processes"):
        call(net, own_batch()[0])


@scenario
def a_module_that_is_gone_holds_nothing():
    net = Net()
    parameters = list(net.parameters())
    wrapped = [DistributedDataParallel(net)]
    own = Processes()
    own.check(parameters)
    assert own.group is dist.group.WORLD
    wrapped[0].itself = wrapped[0]  # a cycle: alive until it is collected
    gc.collect()
    gc.disable()
    try:
        wrapped.clear()
        own = Processes()
        own.check(parameters)
        assert own.group is None
    finally:
        gc.enable()
    fastpcgrad.backward(losses(net, *own_batch()), method=fixed_order())
    assert_grads(parameters, merged(*own_batch()))


@scenario
def a_module_that_takes_the_place_of_another_is_seen():
    net = Net()
    parameters, own = list(net.parameters()), Processes("local")
    first = DistributedDataParallel(net)
    own.check(parameters)
    fastpcgrad.backward(losses(first, *own_batch()), process_group="local")
    fastpcgrad.shared_features(net.trunk(own_batch()[0]), TASKS, process_group="local")
    del first
    gc.collect()
    second = DistributedDataParallel(net, gradient_as_bucket_view=True, static_graph=True)
    assert_refused(lambda: own.check(parameters, moved=True), parameters, "row_dtype")
    assert_refused(doors(second, parameters, own_batch(), "local")["backward"], parameters, "static_graph")
    assert processes.groups_behind([net.trunk(own_batch()[0])], "auto") == [dist.group.WORLD]


@scenario
def who_holds_a_parameter_is_looked_up_once():
    net = Net()
    wrapped = DistributedDataParallel(net)
    parameters, own = list(net.parameters()), Processes("local")
    extra = torch.zeros((), dtype=torch.float64)

    def calls():
        own.check(parameters)
        fresh = own_batch()[0].requires_grad_()  # a leaf of its own in each step, which no module holds
        fastpcgrad.backward(losses(wrapped, fresh, own_batch()[1]), process_group="local")
        fastpcgrad.shared_features(net.trunk(own_batch()[0]) + extra, TASKS, process_group="local")

    calls()
    with no_search():
        calls()
        with pytest.raises(TypeError, match="NoneType"):
            own.check(list(Net().parameters()))  # which shows that the search is what is missing
        for p in parameters:
            p.grad = None
        doors(wrapped, parameters, own_batch())["backward"]()
    assert_grads(parameters, merged(*batch()))


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
