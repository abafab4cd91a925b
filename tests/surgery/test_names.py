"""Tasks by name and layers by name: in what is given, and in the report."""

import copy

import pytest
import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods
from tests.surgery.setting import FIXED, Setting

TASKS = ["seg", "depth", "edges"]


def pair(**options):
    """The same tasks, by index and by name."""
    by_index, by_name = Setting(**options), Setting(**options)
    by_name.surgery = fastpcgrad.GradientSurgery(by_name.parameters, tasks=TASKS, method=methods.PCGrad(FIXED))
    return by_index, by_name


def same(by_index, by_name):
    for p, q in zip(by_index.parameters, by_name.parameters, strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_task_goes_by_its_name_or_its_index():
    by_index, by_name = pair()
    by_index.fill(0, 1, 2)
    by_index.surgery.merge()
    for t in ("edges", 0, "depth"):
        with by_name.surgery.task(t):
            by_name.loss(TASKS.index(t) if isinstance(t, str) else t).backward()
    report = by_name.surgery.merge()
    same(by_index, by_name)
    assert report.names == tuple(TASKS) and by_name.surgery.num_tasks == 3
    assert {"surgery/weight/seg", "surgery/cos/seg-depth"} <= set(report.as_dict())
    assert "tasks=['seg', 'depth', 'edges']" in repr(report)


@pytest.mark.parametrize("functions", [False, True])
def test_losses_may_be_a_dict_in_any_order_and_without_some(functions):
    by_index, by_name = pair()
    losses = [(lambda t=t: by_index.loss(t)) if functions else by_index.loss(t) for t in range(3)]
    by_index.surgery.backward([losses[0], None, losses[2]])
    named = {
        name: (lambda t=t: by_name.loss(t)) if functions else by_name.loss(t) for name, t in (("edges", 2), ("seg", 0))
    }
    report = by_name.surgery.backward({**named, "depth": None})
    same(by_index, by_name)
    assert report.tasks == (0, 2)
    assert [key for key in report.as_dict() if "grad_norm" in key] == [
        "surgery/grad_norm/seg",
        "surgery/grad_norm/edges",
    ]


def test_a_number_of_tasks_names_none():
    surgery = fastpcgrad.GradientSurgery([torch.zeros(2, requires_grad=True)], tasks=2)
    assert surgery.num_tasks == 2 and surgery.tasks == ()
    p = surgery._layouts.trainable()[0]
    report = surgery.backward({1: p.sum(), 0: -p[0]})
    assert report.tasks == (0, 1) and report.names == ()


def test_the_drop_in_takes_names_and_a_dict():
    grads = []
    for tasks in (None, ["left", "right"]):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), variant=FIXED, tasks=tasks)
        for _ in range(3):  # the later ones are small rounds
            optimizer.zero_grad()
            left, right = (model(torch.ones(3, 4)) * torch.tensor([1.0, -2.0])).mean(dim=0).unbind()
            losses = [left + right**2, right]
            optimizer.pc_backward(losses if tasks is None else {"right": losses[1], "left": losses[0]})
        grads.append(model.weight.grad)
    assert torch.equal(*grads)
    assert optimizer.report.names == ("left", "right") and "surgery/weight/right" in optimizer.report.as_dict()
    assert optimizer._surgery.tasks == copy.deepcopy(optimizer)._surgery.tasks
    with pytest.raises(ValueError, match="3 losses for the tasks"):
        optimizer.pc_backward([model.weight.sum()] * 3)


def test_features_name_their_tasks_in_the_report():
    reports = []
    z = torch.ones(3, requires_grad=True) * 1
    features = fastpcgrad.shared_features(z, tasks=["a", "b"], on_report=reports.append)
    (features[0].sum() - features[1][0] * 2).backward()
    assert reports[0].names == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, TypeError, ["num_tasks", "tasks"]),
        ({"num_tasks": 2, "tasks": ["a", "b"]}, TypeError, ["either", "'a'"]),
        ({"tasks": []}, ValueError, ["one name or more"]),
        ({"tasks": ["a", "a"]}, ValueError, ["once", "'a'"]),
        ({"tasks": "ab"}, TypeError, ["list of names", "ab"]),
        ({"tasks": ["a", 1]}, TypeError, ["list of names", "1"]),
        ({"tasks": 0}, ValueError, ["tasks", ">= 1", "0"]),
        ({"tasks": True}, ValueError, ["tasks", "True"]),
        ({"tasks": 2, "granularity": "layer"}, ValueError, ["model="]),
        ({"tasks": 2, "model": "bert"}, TypeError, ["torch.nn.Module", "str"]),
        ({"tasks": 2, "granularity": "layer", "model": nn.Linear(1, 1)}, ValueError, ["model", "[2]"]),
    ],
)
def test_wrong_names_and_models_are_refused(arguments, error, words):
    with pytest.raises(error) as caught:
        fastpcgrad.GradientSurgery([torch.zeros(2, requires_grad=True)], **arguments)
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_name_is_refused_with_those_that_are_known():
    surgery = fastpcgrad.GradientSurgery([torch.zeros(2, requires_grad=True)], tasks=TASKS)
    with pytest.raises(IndexError, match=r"'seg', 'depth', 'edges'.*found 'sge'"):
        surgery.task("sge")
    with pytest.raises(ValueError, match=r"key 'sge'; the tasks have the names \['seg'"):
        surgery.backward({"sge": torch.ones((), requires_grad=True)})
    with pytest.raises(TypeError, match=r"losses\[0\].*found str.*'seg'.*tasks=\[\.\.\.\]"):
        fastpcgrad.GradientSurgery([torch.zeros(2, requires_grad=True)], 2).backward({"seg": None})


class Net(nn.Module):
    """Blocks in a list, of which one has a Sequential of its own; an embedding, and a head that is tied to it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = hidden + block["b"](block["a"](hidden).tanh())
        return self.head(self.mlp(hidden))


LAYERS = ["embed", "blocks.0", "blocks.1", "mlp.0", "mlp.2.0", "mlp.2.1"]


def losses_of(net):
    out = net(torch.arange(5)).square()
    return [out[:, 0].mean(), out[:, 1].mean() - out[:, 0].mean(), out[:, 2:].mean() - out[:, 1].mean()]


def collections_of(net):
    def of(name):
        return [p for n, p in net.named_parameters() if n == name or n.startswith(f"{name}.")]

    return [of(name) for name in LAYERS]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


def test_layers_are_the_nearest_blocks_and_have_names(net):
    report = fastpcgrad.GradientSurgery(
        net.parameters(), tasks=TASKS, method=methods.PCGrad(FIXED), granularity="layer", model=net
    ).backward(losses_of(net))
    found = [p.grad.clone() for p in net.parameters()]
    assert list(report.layers) == LAYERS
    by_hand = fastpcgrad.GradientSurgery(
        net.parameters(), 3, methods.PCGrad(FIXED), granularity=collections_of(net)
    ).backward(losses_of(net))
    assert all(map(torch.equal, found, [p.grad for p in net.parameters()]))
    assert torch.equal(report.segment_grams, by_hand.segment_grams)
    figures = report.as_dict(prefix="")
    for layer, cosines in zip(LAYERS, report.segment_cosines, strict=True):
        above = cosines[[0, 0, 1], [1, 2, 2]]
        assert figures[f"conflict_rate/{layer}"] == pytest.approx((above < 0).double().mean().item())


def test_only_what_undergoes_surgery_is_in_a_layer(net):
    """Whatever the model has besides it; frozen ones, and what is outside of ``shared``, are in none."""
    net.mlp.requires_grad_(False)
    outside = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    shared = list(net.blocks.parameters())
    surgery = fastpcgrad.GradientSurgery([*net.parameters(), outside], 3, granularity="layer", model=net, shared=shared)
    report = surgery.backward([loss + outside.sum() for loss in losses_of(net)])
    assert list(report.layers) == ["blocks.0", "blocks.1"]
    assert outside.grad.tolist() == [3, 3]
    net.mlp.requires_grad_(True)
    later = fastpcgrad.GradientSurgery(net.parameters(), 3, granularity="layer", model=net)
    net.blocks.requires_grad_(False)
    assert list(later.backward(losses_of(net)).layers) == [name for name in LAYERS if "blocks" not in name]


def test_parameters_have_their_names(net):
    surgery = fastpcgrad.GradientSurgery(net.parameters(), 3, granularity="parameter", model=net)
    assert list(surgery.backward(losses_of(net)).layers) == [name for name, _ in net.named_parameters()]
    surgery.method = methods.PCGrad("tensorlogic")  # works on each parameter by itself, whatever is asked for
    assert len(surgery.backward(losses_of(net)).layers) == len(list(net.parameters()))


def test_a_method_that_works_on_parameters_has_no_layers(net):
    surgery = fastpcgrad.GradientSurgery(
        net.parameters(), 3, methods.PCGrad("tensorlogic"), granularity="layer", model=net
    )
    report = surgery.backward(losses_of(net))
    assert len(report.weights) == len(list(net.parameters())) and list(report.layers) == []


def test_a_model_alone_changes_nothing(net):
    surgery = fastpcgrad.GradientSurgery(net.parameters(), 3, model=net)
    assert surgery.backward(losses_of(net)).segment_grams is None
