"""Parameters of several dtypes, or on several devices: one surgery over all of them, merged in place."""

import copy
import random

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference, variants
from tests.linear_problems import Kind, random_problem

SHAPES = tuple(Kind(shape) for shape in ((), (0,), (7,), (32,), (4, 4), (3, 5), (2, 3, 4)))


class Elsewhere(torch.nn.Parameter):
    """On a device that this machine has under another name: as far as rows are concerned, another one."""

    device = torch.device("cpu", 0)


def several_dtypes(index, kind):
    """bf16 weights beside fp32 norms, and a few in fp64."""
    return kind.parameter((torch.bfloat16, torch.float32, torch.float32, torch.float64)[index % 4])


def several_devices(index, kind):
    if index % 2:
        return kind.parameter(torch.float32)
    if torch.cuda.is_available():
        return torch.nn.Parameter(kind.parameter(torch.float32).detach().cuda())
    return Elsewhere(kind.parameter(torch.float32).detach())


for_all_kinds = pytest.mark.parametrize("made", [several_dtypes, several_devices])


class Case:
    """A random problem on parameters of several kinds, and the task gradients in float64 as they round."""

    def __init__(self, made, seed, max_tasks=5):
        problem = random_problem(seed, max_tasks=max_tasks, kinds=SHAPES)
        self.parameters = [made(index, kind) for index, kind in enumerate(problem.kinds)]
        self.gradients = [
            [None if g is None else g.to(p.dtype) for g, p in zip(task, self.parameters, strict=True)]
            for task in problem.gradients
        ]
        self.exact = [[None if g is None else g.double() for g in task] for task in self.gradients]
        self.lengths = sum(sum(float(g.norm()) for g in task if g is not None) for task in self.exact)

    def fill(self, surgery):
        for t, task in enumerate(self.gradients):
            with surgery.task(t):
                for p, g in zip(self.parameters, task, strict=True):
                    p.grad = None if g is None else g.to(p.device, copy=True)

    def check(self, expected):
        """By the measure that all backends are held to; the rounding of the merged gradient is that of its dtype."""
        for p, e in zip(self.parameters, expected, strict=True):
            assert (p.grad is None) == (e is None)
            if e is not None:
                assert p.grad.dtype == p.dtype and p.grad.device.type == p.device.type
                unit = 4e-3 if p.dtype == torch.bfloat16 else 1e-6
                assert (p.grad.cpu().double() - e).norm() <= unit * self.lengths


def in_float64(case):
    return [torch.nn.Parameter(p.detach().cpu().double()) for p in case.parameters]


@for_all_kinds
@pytest.mark.parametrize("variant", list(variants.VARIANTS))
def test_every_variant_sees_all_of_them_as_one_vector(made, variant):
    for seed in range(12):
        case = Case(made, seed)
        method = methods.PCGrad(variant, generator=random.Random(seed))
        surgery = fastpcgrad.GradientSurgery(case.parameters, len(case.gradients), method)
        case.fill(surgery)
        surgery.merge()
        case.check(reference.merge(case.exact, in_float64(case), variant, random.Random(seed)))


@for_all_kinds
@pytest.mark.parametrize("granularity", ["model", "parameter"])
@pytest.mark.parametrize("method", [methods.MGDA, methods.UPGrad, lambda: methods.TrimmedMean(1)])
def test_methods_and_shared_parameters(made, granularity, method):
    for seed in range(6):
        case, grams = Case(made, seed, max_tasks=4), []
        if len(case.gradients) < 3:
            continue
        twin = copy.deepcopy(case)
        twin.parameters, twin.gradients = in_float64(case), case.exact
        for own in (case, twin):
            options = {"shared": own.parameters[::2], "granularity": granularity}
            surgery = fastpcgrad.GradientSurgery(own.parameters, len(own.gradients), method(), **options)
            own.fill(surgery)
            report = surgery.merge()
            grams.append(report.gram.cpu())
        torch.testing.assert_close(*grams, rtol=1e-6, atol=1e-6 * grams[0].abs().max().item())
        if method is not methods.MGDA:  # which stops within its own tolerance
            case.check([p.grad for p in twin.parameters])


@for_all_kinds
def test_the_merged_gradient_lies_in_a_row(made):
    case = Case(made, 3)
    surgery = fastpcgrad.GradientSurgery(case.parameters, len(case.gradients))
    case.fill(surgery)
    rows = surgery._layouts.current.capture.rows
    held = {g.data_ptr() for row in rows._rows.values() for g in row if g is not None}
    surgery.merge()
    assert {p.grad.data_ptr() for p in case.parameters if p.grad is not None} <= held


@for_all_kinds
@pytest.mark.parametrize("call", ["drop-in", "backward", "grad", "features"])
def test_the_other_doors(made, call):
    parameters = [made(index, Kind((3,))) for index in range(4)]
    weights = [torch.tensor([[1.0, 2, -1], [-2.0, 1, 0.5]])[t] for t in range(2)]
    rows = [[(w * (1 + index)).double() for index in range(4)] for w in weights]
    expected = reference.merge(rows, [torch.zeros(3, dtype=torch.float64)] * 4, "tensorflow")

    def losses(given):
        return [
            sum((p.float().cpu() * w * (1 + i)).sum() for i, p in enumerate(given[t])) for t, w in enumerate(weights)
        ]

    method = methods.PCGrad("tensorflow")
    if call == "drop-in":
        optimizer = fastpcgrad.PCGrad(torch.optim.SGD(parameters, lr=0.1), method=method)
        optimizer.pc_backward(losses([parameters] * 2))
    elif call == "backward":
        fastpcgrad.backward(losses([parameters] * 2), method=method)
    elif call == "features":
        sum(losses(fastpcgrad.shared_features([p * 1 for p in parameters], 2, method))).backward()
    found = [p.grad for p in parameters]
    if call == "grad":
        found = fastpcgrad.grad(losses([parameters] * 2), parameters, method=method)
    for p, f, e in zip(parameters, found, expected, strict=True):
        assert f.dtype == p.dtype
        torch.testing.assert_close(f.cpu().double(), e, rtol=1e-2 if p.dtype == torch.bfloat16 else 1e-6, atol=0)


def test_sums_in_another_dtype_and_a_common_one_of_the_rows():
    case = Case(several_dtypes, 5)
    expected = reference.merge(case.exact, in_float64(case), "tensorflow")
    for options in ({"row_dtype": torch.float64}, {"accumulate_dtype": torch.float64}):
        method = methods.PCGrad("tensorflow")
        surgery = fastpcgrad.GradientSurgery(case.parameters, len(case.gradients), method, **options)
        case.fill(surgery)
        surgery.merge()
        case.check(expected)


@for_all_kinds
def test_the_plan_counts_each_in_its_own_dtype_where_it_lies(made):
    parameters = [made(index, Kind((1000,))) for index in range(4)]
    plan = fastpcgrad.GradientSurgery(parameters, 3).memory_plan()
    uses = [plan.device, *plan.others]
    assert sum(use.rows for use in uses) == 3 * sum(p.nbytes for p in parameters)
    assert [use.device for use in uses] == list(dict.fromkeys(p.device for p in parameters))
    assert plan.total == sum(use.total for use in uses)


def test_rows_in_host_memory_are_of_one_kind():
    for made, word in ((several_devices, "devices"), (several_dtypes, "dtypes")):
        parameters = [made(index, Kind((3,))) for index in range(4)]
        with pytest.raises(ValueError, match=f"row_device.*several {word}"):
            fastpcgrad.GradientSurgery(parameters, 2, row_device="cpu")
