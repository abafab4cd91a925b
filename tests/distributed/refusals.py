"""Two processes: what is refused there and what is not, and that an ordinary step afterwards is right either way."""

import gc

import pytest
import torch
import torch._dynamo  # which FSDP would otherwise import in each rank
import torch.distributed as dist
from torch.distributed._composable.replicate_with_fsdp import replicate as replicate_with_fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastpcgrad
from fastpcgrad import FastPCGradWarning, balancing
from fastpcgrad.distributed import processes
from fastpcgrad.distributed.groups import Processes
from tests.distributed.own_batches import (
    TASKS,
    Net,
    assert_grads,
    assert_ordinary_steps_are_right,
    assert_refused,
    batch,
    doors,
    fixed_order,
    losses,
    merged,
    mesh,
    no_search,
    no_warning,
    own_batch,
    rounds,
    rows,
    sharded,
)
from tests.distributed.scenarios import Scenarios

SCENARIOS = Scenarios()
scenario, each = SCENARIOS.one, SCENARIOS.each


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
def features_are_looked_behind_where_only_some_of_them_were_before():
    x, (before, others, averaged) = own_batch()[0], (Net().trunk for _ in range(3))
    averaged = DistributedDataParallel(averaged)
    assert processes.groups_behind([before(x)], "local") == []
    for features in ([averaged(x)], [others(x), averaged(x)], [x.clone().requires_grad_() * 2, averaged(x)]):
        assert processes.groups_behind([before(x), *features], "auto") == [dist.group.WORLD]


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
