"""What is refused where several processes hold a model, and that where there is one nothing is looked for."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import fastpcgrad
from fastpcgrad import FastPCGradWarning, gradNorm, methods
from fastpcgrad.balancing import GradNorm
from fastpcgrad.distributed import groups, processes
from fastpcgrad.distributed.groups import Processes
from fastpcgrad.distributed.processes import check_process_group
from tests.distributed import ranks, refusals, shared_layers

CASES = [(module, name) for module in (refusals, shared_layers) for name in module.SCENARIOS]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By module what each rank said of each scenario."""
    known = {}

    def of(module):
        if module not in known:
            known[module] = ranks.run(module.__name__, 2, tmp_path_factory.mktemp("ranks"), seconds=90)
        return known[module]

    return of


@pytest.mark.parametrize(("module", "name"), CASES, ids=[name for _, name in CASES])
def test_on_two_processes(module, name, outcomes):
    said = outcomes(module)[name]
    assert said == ["", ""], "\n".join(said)


def test_a_rank_that_fails_or_dies_is_an_error_in_all(tmp_path):
    said = ranks.run("tests.distributed.mishaps", 2, tmp_path, seconds=60)
    assert said["goes_well"] == ["", ""]
    assert "AssertionError: of rank 1" in said["fails_on_one"][1] and said["fails_on_one"][0] == ""
    assert "did not get here" in said["dies_on_one"][1]
    assert said["waits_for_the_dead"][0] and "did not get here" in said["waits_for_the_dead"][1]


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def no_search(monkeypatch):
    monkeypatch.setattr(processes, "_holders", None)


def every_door(net, x, process_group="auto"):
    """Each call that looks at processes, on a network with two outputs."""
    parameters = list(net.parameters())

    def losses():
        return list(net(x).square().mean(dim=0))

    options = {"process_group": process_group}
    return {
        "backward": lambda: fastpcgrad.backward(losses(), **options),
        "grad": lambda: fastpcgrad.grad(losses(), parameters, **options),
        "shared_features": lambda: fastpcgrad.shared_features(net(x), 2, **options),
        "check": lambda: Processes(**options).check(parameters),
        "note_gradients": lambda: GradNorm(2, 0.5, **options).note_gradients(losses(), net),
        "gradNorm": lambda: gradNorm(Column(net), parameters[0], 0.5, [(x,)], 1, 0.1, 0.1, **options),
    }


class Column(torch.nn.Module):
    """Gives the losses of each column."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).square().mean(dim=0)


DOORS = list(every_door(torch.nn.Linear(1, 1), None))


@pytest.mark.parametrize("door", DOORS)
def test_without_a_process_group_nothing_is_looked_for(no_search, door):
    every_door(torch.nn.Linear(3, 2), torch.randn(4, 3))[door]()


@pytest.mark.parametrize("door", DOORS)
def test_a_torch_without_distributed_will_do(monkeypatch, no_search, door):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    for name in ("is_initialized", "ProcessGroup", "DeviceMesh", "get_world_size"):
        monkeypatch.delattr(torch.distributed, name)
    for choice in ("auto", "local", None):
        every_door(torch.nn.Linear(3, 2), torch.randn(4, 3), choice)[door]()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("wrap", [lambda net: net, DistributedDataParallel], ids=["plain", "ddp"])
def test_one_process_with_a_group_is_right_and_silent(alone, door, wrap):
    x, net, twin = torch.randn(4, 3), torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastPCGradWarning)
        found = every_door(wrap(net), x)[door]()
    if door == "backward":
        found = [p.grad for p in net.parameters()]
    if door in ("backward", "grad"):
        rows = [
            torch.autograd.grad(loss, list(twin.parameters()))
            for loss in (twin(x)[:, t].square().mean() for t in (0, 1))
        ]
        expected = fastpcgrad.reference.merge(rows, list(twin.parameters()), "tensorflow")
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e)


@pytest.mark.parametrize("choice", ["auto", "local"])
@pytest.mark.parametrize("door", [door for door in DOORS if door != "check"])
def test_parameters_that_are_gathered_are_refused_also_with_one_process(alone, door, choice):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(torch.nn.Linear(3, 2), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(NotImplementedError, match="found a"):
        every_door(net, torch.randn(4, 3), choice)[door]()


def test_one_process_that_has_all_tasks_is_right(alone):
    net, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(net.state_dict())
    x = torch.randn(4, 3)
    for model, options in ((net, {"parallel": "task"}), (twin, {})):
        surgery = fastpcgrad.GradientSurgery(model.parameters(), 2, methods.PCGrad("tensorflow"), **options)
        surgery.backward(list(model(x).square().mean(dim=0)))
    assert torch.equal(net.weight.grad, twin.weight.grad)


def test_tasks_are_not_shared_out_without_a_process_group():
    net = torch.nn.Linear(3, 2)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), parallel="task")
    with pytest.raises(RuntimeError, match="parallel='task' needs several processes: call torch"):
        optimizer.pc_backward([net(torch.ones(1, 3)).sum(), None])
    assert net.weight.grad is None


class DeepSpeedEngine(torch.nn.Module):
    """Stands for DeepSpeed's, which is not here: known by its name."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("door", DOORS)
def test_the_engine_of_deepspeed_is_refused_by_name(alone, door):
    net = torch.nn.Linear(3, 2)
    engine = DeepSpeedEngine(net)
    with pytest.raises(NotImplementedError, match=r"\[.*\] of DeepSpeed"):
        every_door(net, torch.randn(4, 3))[door]()
    del engine


class Unhashable(type):
    def __eq__(cls, other):
        raise AssertionError("a class was compared")


def test_live_objects_of_any_class_are_looked_through(alone):
    found = [Unhashable("Odd", (), {})()]
    Processes().check([torch.nn.Parameter(torch.zeros(2))])
    del found


def test_a_list_of_parameters_is_looked_at_once(alone, monkeypatch):
    calls, search = [], processes._holders
    monkeypatch.setattr(processes, "_holders", lambda: calls.append(1) or search())
    own, parameters = Processes(), list(torch.nn.Linear(3, 2).parameters())
    for _ in range(3):
        own.check(parameters)
    assert len(calls) == 1
    own.check(list(parameters))
    assert len(calls) == 2


def test_parameters_are_looked_at_again_when_a_group_appears(monkeypatch):
    own, parameters, calls = Processes(), list(torch.nn.Linear(3, 2).parameters()), []
    monkeypatch.setattr(processes, "_holders", lambda: calls.append(1) or iter(()))
    own.check(parameters)
    assert not calls
    monkeypatch.setattr(groups, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    own.check(parameters)
    assert calls


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_a_copy_keeps_the_choice_and_looks_for_itself(alone, copied):
    wrapped = DistributedDataParallel(torch.nn.Linear(3, 2))
    own, parameters = Processes("local"), list(wrapped.parameters())
    own.check(parameters)
    twin = copied(own)
    assert twin.process_group == "local"
    assert twin._checked[0] is None and not twin._replicas


def test_what_process_group_may_be():
    assert [check_process_group(value) for value in ("auto", None, "local")] == ["auto", "auto", "local"]


@pytest.mark.parametrize(
    ("value", "error", "word"),
    [
        ("world", ValueError, "'world'"),
        ("", ValueError, "''"),
        (0, TypeError, "int"),
        (torch.ones(2), TypeError, "Tensor"),
    ],
)
def test_what_process_group_may_not_be(value, error, word):
    x = torch.ones(2, requires_grad=True)
    for call in (
        lambda: check_process_group(value),
        lambda: Processes(value),
        lambda: fastpcgrad.backward([x[0], x[1]], process_group=value),
        lambda: fastpcgrad.grad([x[0], x[1]], [x], process_group=value),
        lambda: fastpcgrad.shared_features(x, 2, process_group=value),
        lambda: GradNorm(2, 0.5, process_group=value),
        lambda: gradNorm(torch.nn.Linear(1, 1), x, 0.5, [], 1, 0.1, 0.1, process_group=value),
    ):
        with pytest.raises(error, match=f"process_group.*'auto' or 'local'.*; found .*{word}"):
            call()
    assert x.grad is None
