"""Peers compute what they are said to compute: no number is worth anything otherwise."""

import random

import pytest
import torch

from benchmarks import check, models, subjects
from benchmarks.cases import OPS, KernelCase, StepCase
from benchmarks.peers.loop import LoopPCGrad, loop_pcgrad
from fastpcgrad import reference

SMALL_STEPS = (StepCase("tutorial", 2, 64), StepCase("mlp", 3, 32))


def present(contenders):
    """Those that can be imported; the loop is always among them."""
    return [c for c in contenders if not isinstance(c, subjects.Missing)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_every_contender_of_an_op_agrees_with_the_oracle(op, dtype):
    case = KernelCase(op, 2, 64, dtype)
    for contender in present(subjects.kernel_contenders(case)):
        assert check.kernel_error(contender, case) <= 1, contender.name


@pytest.mark.parametrize("case", SMALL_STEPS, ids=lambda case: case.label)
def test_every_contender_of_a_step_agrees_with_the_oracle(case):
    for contender in present(subjects.step_contenders()):
        assert check.step_error(contender, case) <= 1, contender.name


def test_a_wrong_answer_is_noticed():
    def off_by_a_little(x):
        return lambda: reference.combine(x.rows, x.weights * (1 + 3e-6))

    case = KernelCase("combine", 2, 64)
    wrong = subjects.KernelContender("wrong", "", "", off_by_a_little)
    assert check.kernel_error(wrong, case) > 1
    nan = subjects.KernelContender("nan", "", "", lambda x: lambda: x.out * float("nan"))
    assert not check.kernel_error(nan, case) <= 1


def test_a_peer_that_cannot_be_imported_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr(subjects, "_PEERS", (("absent", "absent", "absent_peer", "torchjd", 0, False),))
    found = subjects.kernel_contenders(KernelCase("pcgrad", 2, 64)) + subjects.step_contenders()
    missing = [c for c in found if isinstance(c, subjects.Missing)]
    assert [c.name for c in missing] == ["absent", "absent"]
    assert all("absent_peer" in c.reason for c in missing)


def test_loop_leaves_the_generator_and_its_input_as_the_original_does():
    rows = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]), torch.tensor([0.5, -2.0])]
    before = [row.clone() for row in rows]
    random.seed(3)
    merged = loop_pcgrad(rows)
    after = random.random()
    assert all(torch.equal(row, old) for row, old in zip(rows, before, strict=True))
    random.seed(3)
    (expected,) = reference.merge([[row.double()] for row in rows], rows[:1], "pytorch-pcgrad")
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)
    assert random.random() == after


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loop_averages_what_all_tasks_share_and_adds_elsewhere(reduction):
    problem = models.build_small(SMALL_STEPS[1])
    parameters = problem.parameters_list()
    tasks = check.task_gradients(problem)
    optimizer = LoopPCGrad(subjects.new_optimizer(problem), reduction)
    check.seed(5)
    optimizer.pc_backward(problem().losses)
    check.seed(5)
    expected = reference.merge(tasks, parameters, "pytorch-pcgrad", reduction=reduction)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def test_loop_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="'median'"):
        LoopPCGrad(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), "median")


@pytest.mark.parametrize("tasks", [4, 8])
def test_the_large_model_has_the_size_it_is_named_for(tasks):
    with torch.device("meta"):
        trunk = models.mlp_trunk(models.MLP_WIDTH)
    width = sum(p.numel() for p in trunk.parameters()) + tasks * (models.MLP_WIDTH + 1) * models.CLASSES
    assert abs(width / 13.7e6 - 1) < 0.01
