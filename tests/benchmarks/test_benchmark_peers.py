"""Peers compute what they are said to compute: no number is worth anything otherwise."""

import random

import pytest
import torch

from benchmarks import check, kernels, models, modes
from benchmarks.cases import GPTS, OPS, Batch, KernelCase, StepCase
from benchmarks.peers import torchjd_algorithm
from benchmarks.peers.loop import LoopPCGrad, loop_pcgrad
from fastpcgrad import reference

# A peer differentiates through torch.vmap, which has no rule for attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

STEPS = (StepCase("tutorial", 2, Batch(64)), StepCase("mlp", 3, Batch(32)), StepCase(GPTS[0], 3, Batch(4, 128)))


def present(contenders):
    """Those that can be imported; the loop is always among them."""
    return [c for c in contenders if not isinstance(c.build, str)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_every_contender_of_an_op_agrees_with_the_oracle(op, dtype):
    case = KernelCase(op, 2, 64, dtype)
    for contender in present(kernels.contenders(case)):
        assert check.kernel_error(contender, case) <= 1, contender.name


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.label)
def test_every_mode_of_a_step_agrees_with_the_oracle(case, on_gpu):
    for mode in present(modes.modes(case, on_gpu)):
        assert check.step_error(mode, case) <= 1, mode.name


def test_a_wrong_answer_is_noticed():
    def off_by_a_little(x):
        return lambda: reference.combine(x.rows, x.weights * (1 + 3e-6))

    case = KernelCase("combine", 2, 64)
    wrong = kernels.Contender("wrong", "", "", off_by_a_little)
    assert check.kernel_error(wrong, case) > 1
    nan = kernels.Contender("nan", "", "", lambda x: lambda: x.out * float("nan"))
    assert not check.kernel_error(nan, case) <= 1


def test_who_raises_or_is_wrong_has_an_objection():
    def broken():
        raise TypeError("no such call")

    assert check.objection(broken) == "failed: TypeError: no such call"
    assert check.objection(lambda: 3.0).startswith("wrong: 3 times the tolerance")
    assert check.objection(lambda: float("nan")).startswith("wrong: ")
    assert check.objection(lambda: 1.0) == ""


def test_a_peer_that_cannot_be_imported_is_named_with_its_reason(monkeypatch):
    absent = kernels.Peer("torchjd", "absent", "absent_peer", "torchjd", 0, False)
    monkeypatch.setattr(kernels, "PEERS", (absent,))
    found = [*kernels.contenders(KernelCase("pcgrad", 2, 64)), *modes.modes(STEPS[1])]
    missing = [c for c in found if isinstance(c.build, str)]
    assert [c.name for c in missing] == ["torchjd", "torchjd", "torchjd[one by one]"]
    assert all(c.build.startswith("missing: ") and "absent_peer" in c.build and not c.version for c in missing)


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
    problem = models.build_small(STEPS[1])
    parameters = problem.parameters_list()
    tasks = check.task_gradients(problem)
    optimizer = LoopPCGrad(torch.optim.SGD(parameters, lr=1e-4), reduction)
    check.seed(5)
    optimizer.pc_backward(problem().losses)
    check.seed(5)
    expected = reference.merge(tasks, parameters, "pytorch-pcgrad", reduction=reduction)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def test_loop_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="'median'"):
        LoopPCGrad(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), "median")


def test_torchjds_algorithm_is_pcgrad_with_its_order():
    grads = torch.randn(5, 40, dtype=torch.float64)
    torch.manual_seed(3)
    merged = torchjd_algorithm.kernel(grads)()
    torch.manual_seed(3)
    order = torch.stack([torch.randperm(5) for _ in range(5)])
    weights = reference.coefficients(reference.gram(grads), order).sum(dim=0)
    torch.testing.assert_close(merged, weights @ grads)


@pytest.mark.parametrize("tasks", [4, 8])
def test_the_mlp_has_the_size_it_is_named_for(tasks):
    assert abs(models.width_of(StepCase("mlp", tasks, Batch(32))) / 13.7e6 - 1) < 0.01


@pytest.mark.parametrize("size", GPTS, ids=lambda size: size.name)
def test_transformers_have_the_parameters_that_they_are_named_for(size):
    count = models.width_of(StepCase(size, 2, Batch(1, 4)))
    assert count == pytest.approx(size.parameters, rel=0.02)
    assert count == pytest.approx(float(size.name[:-1]) * {"M": 1e6, "G": 1e9}[size.name[-1]], rel=0.1)


def test_a_tasks_own_forward_gives_the_loss_of_the_shared_one():
    for case in STEPS:
        model = models.build_small(case)
        torch.testing.assert_close([model.loss(t) for t in range(case.tasks)], model().losses)
