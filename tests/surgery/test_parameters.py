"""GradientSurgery: parameters that change, of any kind and layout; what is refused."""

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference
from tests.linear_problems import Kind, linear_loss
from tests.surgery.setting import FIXED, Setting


@pytest.mark.parametrize("change", ["freeze", "add"])
def test_parameters_that_change_within_a_round_are_refused_until_it_ends(change):
    setting = Setting()
    optimizer = torch.optim.SGD(setting.parameters, lr=0.1)
    setting.surgery = fastpcgrad.GradientSurgery(optimizer, 3, methods.PCGrad(FIXED))
    setting.fill(0, 1)
    if change == "freeze":
        setting.parameters[2].requires_grad_(False)
    else:
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.float64, requires_grad=True)]})
    with (
        pytest.raises(RuntimeError, match=r"changed within a round.*merge\(\) or discard\(\)"),
        setting.surgery.task(2),
    ):
        raise AssertionError("the task was entered")
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1))
    setting.fill(0, 1)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1))


def test_a_group_that_is_removed_within_a_round_still_gets_its_merged_gradient():
    setting = Setting()
    groups = [{"params": [p]} for p in setting.parameters]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    setting.surgery = fastpcgrad.GradientSurgery(optimizer, 3, methods.PCGrad(FIXED), granularity="group")
    setting.fill(0, 1)
    del optimizer.param_groups[1]
    setting.surgery.merge()
    setting.assert_grad(
        [
            reference.merge([[a], [b]], [p], FIXED)[0]
            for a, b, p in zip(*setting.gradients[:2], setting.parameters, strict=True)
        ]
    )


def test_parameters_that_move_to_another_group_are_of_its_problem():
    """Also where they are the same ones in the same order as before."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(4)]
    rows = torch.randn(2, 4, 3)
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)
    surgery = fastpcgrad.GradientSurgery(optimizer, 2, granularity="group")

    def losses():
        return [linear_loss(parameters, row) for row in rows]

    for start, end in ((1, 4), (3, 4), (0, 4), (2, 4), (2, 3)):
        for p in parameters[end:]:
            p.requires_grad_(False)
        optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = (
            parameters[:start],
            parameters[start:],
        )
        own = [part.flatten(1) for part in (rows[:, :start], rows[:, start:end]) if part.numel()]
        torch.testing.assert_close(
            surgery.backward(losses()).segment_grams, torch.stack([part.double() @ part.T.double() for part in own])
        )
    with surgery.task(0):
        losses()[0].backward()
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = parameters[:1], parameters[1:]
    with pytest.raises(RuntimeError, match="or their groups, changed within a round"), surgery.task(1):
        raise AssertionError("the task was entered")


@pytest.mark.parametrize(
    "kind", [Kind((4, 3, 2, 2), "channels_last"), Kind((5, 3), "transposed"), Kind((3, 5), "gappy"), Kind(())], ids=str
)
def test_gradients_are_laid_out_as_autograd_lays_them_out(kind):
    p, q = kind.parameter(torch.float32), kind.parameter(torch.float32)
    weight = torch.randn(kind.shape)
    linear_loss([q], [weight]).backward()
    rounds = fastpcgrad.GradientSurgery([p], 1)
    with rounds.task(0):
        linear_loss([p], [weight]).backward()
    rounds.merge()
    assert p.grad.shape == q.grad.shape and p.grad.stride() == q.grad.stride()
    torch.testing.assert_close(p.grad, q.grad)


def test_a_parameter_that_is_given_twice_counts_once():
    p = torch.zeros(16, requires_grad=True)
    once, twice = fastpcgrad.GradientSurgery([p], 1), fastpcgrad.GradientSurgery([p, p], 1)
    assert once.nbytes == twice.nbytes
    with twice.task(0):
        p.sum().backward()
    assert twice.merge().gram.item() == 16


@pytest.mark.parametrize("source", ["list", "iterator", "dicts", "optimizer"])
def test_parameters_come_in_any_form_that_optimizers_take(source):
    setting = Setting()
    a, b, c = setting.parameters
    setting.surgery = fastpcgrad.GradientSurgery(
        {
            "list": [a, b, c],
            "iterator": iter([a, b, c]),
            "dicts": [{"params": [a, b]}, {"params": iter([c])}],
            "optimizer": torch.optim.SGD([a, b, c]),
        }[source],
        3,
        methods.PCGrad(FIXED),
    )
    setting.fill(0, 1, 2)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1, 2))


def test_a_model_without_trainable_parameters_goes_through_a_round():
    frozen = torch.zeros(3)
    rounds = fastpcgrad.GradientSurgery(torch.optim.SGD([frozen], lr=0.1), 2)
    for t in range(2):
        with rounds.task(t):
            torch.ones(2, requires_grad=True).sum().backward()
    assert rounds.merge().gram.tolist() == [[0, 0], [0, 0]]
    assert frozen.grad is None


@pytest.mark.parametrize("index", [-1, 3, True, 1.0, None, "0"])
def test_a_task_index_outside_of_the_tasks_is_refused(index):
    with pytest.raises(IndexError, match=r"0\.\.2; found"):
        Setting().surgery.task(index)


def test_the_size_of_the_rows_is_known_beforehand_and_within_its_bound():
    p = torch.zeros(100_000, requires_grad=True)
    for tasks, dtype, itemsize in ((4, None, 4), (3, torch.bfloat16, 2)):
        nbytes = fastpcgrad.GradientSurgery([p], tasks, row_dtype=dtype).nbytes
        assert tasks * p.numel() * itemsize <= nbytes <= 1.05 * tasks * p.numel() * itemsize


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_tasks": 0}, ValueError, ["num_tasks", "0"]),
        ({"num_tasks": 2.0}, ValueError, ["num_tasks", "2.0"]),
        ({"optimizer_or_params": []}, ValueError, ["no parameters"]),
        ({"optimizer_or_params": torch.zeros(2)}, TypeError, ["single tensor", "[2]"]),
        ({"optimizer_or_params": [1.0]}, TypeError, ["float"]),
        ({"optimizer_or_params": [{"lr": 1.0}]}, (TypeError, ValueError), ["params", "lr"]),
        ({"optimizer_or_params": [torch.ones(1, requires_grad=True) * 2]}, ValueError, ["leaves", "[1]"]),
        (
            {"optimizer_or_params": [torch.ones(1, device=d, requires_grad=True) for d in ("cpu", "meta")]},
            ValueError,
            ["no memory", "cpu", "meta"],
        ),
        ({"row_dtype": torch.int32}, TypeError, ["torch.int32", "bfloat16"]),
        ({"method": "paper"}, TypeError, ["Method", "paper"]),
        ({"granularity": "layer"}, ValueError, ["granularity", "layer", "group"]),
        ({"shared": torch.zeros(3)}, TypeError, ["shared", "single tensor"]),
        ({"shared": ["weight"]}, TypeError, ["shared", "str"]),
        ({"shared": [torch.zeros(3, requires_grad=True)]}, ValueError, ["shared", "[3]"]),
        ({"row_device": "cuda"}, ValueError, ["row_device", "'cuda'", "'cpu'"]),
        ({"row_device": "nowhere"}, ValueError, ["row_device", "nowhere"]),
        ({"row_device": 1.5}, ValueError, ["row_device", "1.5"]),
        ({"accumulate": "max"}, ValueError, ["accumulate", "max", "mean"]),
        ({"accumulate_dtype": torch.int32}, TypeError, ["accumulate_dtype", "torch.int32"]),
        ({"accumulate_dtype": torch.bfloat16}, ValueError, ["accumulate_dtype", "bfloat16", "float32"]),
        ({"process_group": object()}, TypeError, ["process_group", "object"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_name_what_was_found(arguments, error, words):
    good = {"optimizer_or_params": [torch.zeros(2, requires_grad=True)], "num_tasks": 2}
    with pytest.raises(error) as caught:
        fastpcgrad.GradientSurgery(**{**good, **arguments})
    assert all(word in str(caught.value) for word in words)
