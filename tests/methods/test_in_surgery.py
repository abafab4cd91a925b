"""Every method inside GradientSurgery: the merged gradient is what the method makes of the packed rows."""

import inspect
import random
import re
from pathlib import Path

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods
from tests.linear_problems import Kind, linear_loss

ARGUMENTS = {
    "CAGrad": {"c": 0.4},
    "CRMOGM": {"method": methods.MGDA()},
    "Constant": {"weights": [0.2, 1.0, 3.0]},
    "FairGrad": {"alpha": 1.0},
    "Krum": {"n_byzantine": 0},
    "MConFIG": {"num_tasks": 3},
    "MoDo": {"num_tasks": 1, "batches": 3},
    "SDMGrad": {"num_tasks": 1},
    "TrimmedMean": {"trim_number": 1},
}
SHAPES = ((4, 3), (), (0,), (70,))


def all_methods():
    for name in methods.__all__:
        kind = getattr(methods, name)
        if inspect.isclass(kind) and issubclass(kind, methods.Method) and not inspect.isabstract(kind):
            yield pytest.param(lambda kind=kind, name=name: kind(**ARGUMENTS.get(name, {})), id=name)


def is_tracking(one):
    """Whether it merges not the rows themselves."""
    return issubclass(getattr(methods, one.id), methods.Tracking)


for_every_method = pytest.mark.parametrize("make", [one for one in all_methods() if not is_tracking(one)])
for_every_method_on_grams = pytest.mark.parametrize(
    "make", [one for one in all_methods() if not getattr(methods, one.id).needs_rows]
)
for_elementwise_methods = pytest.mark.parametrize(
    "make", [methods.GradDrop, lambda: methods.TrimmedMean(1)], ids=["GradDrop", "TrimmedMean"]
)


def filled(make, presence, **options):
    """A surgery with its three rows, its parameters, and the packed rows with zeros for what is absent."""
    values = torch.Generator().manual_seed(3)
    parameters = [Kind(shape).parameter(torch.float64) for shape in SHAPES]
    rounds = fastpcgrad.GradientSurgery(parameters, 3, make(), **options)
    rows = []
    for t, there in enumerate(presence):
        gradients = [torch.randn(shape, generator=values, dtype=torch.float64) for shape in SHAPES]
        with rounds.task(t):
            linear_loss(parameters, [g if here else None for g, here in zip(gradients, there, strict=True)]).backward()
        rows.append(torch.cat([g.flatten() * here for g, here in zip(gradients, there, strict=True)]))
    return rounds, parameters, torch.stack(rows)


def seed():
    torch.default_generator.manual_seed(5)
    random.seed(5)


def aggregated(method, rows):
    seed()
    if isinstance(method, methods.Elementwise):
        return method.aggregate(rows)
    return method.weights(rows @ rows.mT) @ rows


@for_every_method
def test_the_merged_gradient_is_the_methods_own(make):
    rounds, parameters, rows = filled(make, [[True] * 4] * 3)
    expected = aggregated(make(), rows)
    seed()
    report = rounds.merge()
    found = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(report.gram, rows @ rows.mT)
    assert report.weights.isnan().all() == isinstance(rounds.method, methods.Elementwise)


NO_GRAMS = [torch.eye(3), torch.eye(3).long(), [[1.0]], torch.zeros(0, 0).double()]
NO_GRAMS += [torch.ones(shape).double() for shape in ((), (3,), (2, 3), (1, 1, 3, 3))]


@for_every_method_on_grams
@pytest.mark.parametrize("gram", NO_GRAMS, ids=str)
def test_what_is_no_gram_matrix_is_refused(make, gram):
    found = list(gram.shape) if isinstance(gram, torch.Tensor) else "list"
    with pytest.raises((TypeError, ValueError), match=f"gram must be .*found .*{re.escape(str(found))}"):
        make().weights(gram)


@for_elementwise_methods
def test_elementwise_methods_take_absent_gradients_for_zeros(make):
    presence = [[True, False, True, True], [True, True, False, False], [False, True, False, True]]
    rounds, parameters, rows = filled(make, presence)
    expected = aggregated(make(), rows)
    seed()
    rounds.merge()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in parameters]), expected)


@for_elementwise_methods
def test_elementwise_methods_leave_what_is_not_shared_to_a_sum(make):
    values = torch.Generator().manual_seed(4)
    a, b = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (40, 30))
    rows = torch.randn(3, 70, generator=values, dtype=torch.float64)
    rounds = fastpcgrad.GradientSurgery([a, b], 3, make(), shared=[b])
    for t, row in enumerate(rows):
        with rounds.task(t):
            (a @ row[:40] + b @ row[40:]).backward()
    expected = aggregated(make(), rows[:, 40:])
    seed()
    report = rounds.merge()
    torch.testing.assert_close(a.grad, rows[:, :40].sum(dim=0))
    torch.testing.assert_close(b.grad, expected)
    torch.testing.assert_close(report.gram, rows[:, 40:] @ rows[:, 40:].mT)


@pytest.mark.parametrize("make", list(all_methods()))
def test_the_docs_name_the_methods_whose_merged_gradient_does_not_scale(make):
    """Over three steps, for what a method keeps scales along."""
    values = torch.Generator().manual_seed(3)
    steps = torch.randn(3, 3, 20, generator=values, dtype=torch.float64)

    def merged(scale):
        method = make()
        if isinstance(method, methods.GradDrop | methods.GradVac | methods.RandomWeights):
            method.generator = torch.Generator().manual_seed(1)
        parameter = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))
        surgery = fastpcgrad.GradientSurgery([parameter], 3, method)
        seed()
        for rows in steps:
            surgery.backward([scale * (1 + parameter @ row) for row in rows])
        return parameter.grad / scale

    expected = merged(1.0)
    scales = all(torch.allclose(merged(scale), expected, rtol=1e-9) for scale in (2.0**-30, 2.0**-10, 2.0**10))
    text = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"## Scale\n\nGradients c times as large(.*?)Where TorchJD", text, flags=re.DOTALL)
    only_with_arguments = isinstance(make(), methods.MGDA | methods.MoDo | methods.SDMGrad)
    assert scales == (f"`{type(make()).__name__}`" not in named or only_with_arguments)
