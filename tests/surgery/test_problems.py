"""GradientSurgery: which parameters form one problem, rows of other dtypes, any method."""

import itertools
import random

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference
from tests.surgery.setting import FIXED, Setting, Weighted, assert_unchanged, snapshot


@pytest.mark.parametrize("variant", ["pytorch-pcgrad", "torchjd", FIXED])
@pytest.mark.parametrize("granularity", ["model", "group", "parameter"])
def test_granularity_says_which_parameters_form_one_problem(variant, granularity):
    setting = Setting()
    a, b, c = setting.parameters
    optimizer = torch.optim.SGD([{"params": [a, c]}, {"params": [b], "lr": 0.2}], lr=0.1)
    method = methods.PCGrad(variant, generator=random.Random(4))
    setting.surgery = fastpcgrad.GradientSurgery(optimizer, 3, method, granularity=granularity)
    setting.fill(0, 1, 2)
    report = setting.surgery.merge()

    places = [p for group in optimizer.param_groups for p in group["params"]]
    index = {id(p): i for i, p in enumerate(setting.parameters)}
    problems = {"model": [places], "group": [[a, c], [b]], "parameter": [[p] for p in places]}[granularity]
    expected, generator = [None] * 3, random.Random(4)
    for problem in problems:
        chosen = [[task[index[id(p)]] for p in problem] for task in setting.gradients]
        for p, merged in zip(problem, reference.merge(chosen, problem, variant, generator), strict=True):
            expected[index[id(p)]] = merged
    setting.assert_grad(expected)
    assert report.weights.shape == ((3,) if granularity == "model" else (len(problems), 3))


@pytest.mark.parametrize("granularity", ["model", "group", "parameter"])
def test_a_method_of_single_parameters_stays_one_whatever_the_granularity(granularity):
    setting = Setting()
    groups = [{"params": setting.parameters[:2]}, {"params": setting.parameters[2:]}]
    method = methods.PCGrad("tensorlogic")
    setting.surgery = fastpcgrad.GradientSurgery(groups, 3, method, granularity=granularity)
    setting.fill(0, 1, 2)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1, 2, variant="tensorlogic"))


@pytest.mark.parametrize("shared", [(), (0,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_only_shared_parameters_undergo_surgery(shared):
    setting = Setting()
    named = [setting.parameters[p] for p in shared]
    setting.surgery = fastpcgrad.GradientSurgery(setting.parameters, 3, methods.PCGrad(FIXED), shared=named)
    setting.fill(2, 0, 1)
    report = setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1, 2, shared=list(shared)))
    rows = [
        torch.cat(
            [torch.zeros(0)]
            + [
                torch.zeros(p.numel()) if task[i] is None else task[i].flatten()
                for i, p in enumerate(setting.parameters)
                if i in shared
            ]
        )
        for task in setting.gradients
    ]
    torch.testing.assert_close(report.gram, reference.gram(torch.stack(rows)))


@pytest.mark.parametrize("shared", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_a_parameter_that_is_not_shared_is_no_problem(shared):
    setting = Setting()
    named = [setting.parameters[p] for p in shared]
    setting.surgery = fastpcgrad.GradientSurgery(
        setting.parameters, 3, methods.PCGrad(FIXED), shared=named, granularity="parameter"
    )
    setting.fill(0, 1, 2)
    report = setting.surgery.merge()
    assert report.weights.shape == (len(shared), 3)
    expected = [sum(g for g in column if g is not None) for column in zip(*setting.gradients, strict=True)]
    for gram, p in zip(report.segment_grams, shared, strict=True):
        chosen = [[task[p]] for task in setting.gradients]
        (expected[p],) = reference.merge(chosen, [setting.parameters[p]], FIXED)
        rows = [torch.zeros(setting.parameters[p].numel()) if g is None else g.flatten() for (g,) in chosen]
        torch.testing.assert_close(gram, reference.gram(torch.stack(rows)))
    setting.assert_grad(expected)


def test_row_dtype_bfloat16_halves_the_rows_and_keeps_to_its_tolerance():
    setting, plain = Setting(torch.float32, row_dtype=torch.bfloat16), Setting(torch.float32)
    assert setting.surgery.nbytes < plain.surgery.nbytes
    setting.fill(0, 1, 2)
    report = setting.surgery.merge()
    expected = setting.oracle(0, 1, 2)
    assert all(p.grad.dtype == torch.float32 for p in setting.parameters)
    error = sum((p.grad.double() - e).square().sum() for p, e in zip(setting.parameters, expected, strict=True))
    rows = [torch.cat([g.flatten() for g in task if g is not None]) for task in setting.gradients]
    scale = sum(w * row.norm() for w, row in zip(report.weights, rows, strict=True))
    # 4e-3 for the merge of bf16 rows, as much again for rounding the gradients to bf16 in the first place.
    assert error.sqrt() <= 2 * 4e-3 * scale


def test_float64_rows_of_float32_parameters_add_micro_batches_without_rounding():
    setting = Setting(torch.float32, row_dtype=torch.float64)
    p = setting.parameters[1]
    with setting.surgery.task(0):
        (p * 1.0).backward()
    for _ in range(4):
        with setting.surgery.task(0):
            (p * 2.0**-26).backward()
    report = setting.surgery.merge()
    assert report.norms[0] == 1 + 2.0**-24
    assert p.grad.dtype == torch.float32


def test_row_dtype_lets_parameters_have_several_dtypes():
    single, double = torch.zeros(3, requires_grad=True), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    rounds = fastpcgrad.GradientSurgery([single, double], 2, row_dtype=torch.float32)
    for t in range(2):
        with rounds.task(t):
            (single.sum() + (1 + t) * double.sum()).backward()
    rounds.merge()
    assert single.grad.dtype == torch.float32 and double.grad.dtype == torch.float64
    assert single.grad.tolist() == [2.0] * 3 and double.grad.tolist() == [3.0] * 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_any_method_sees_the_tasks_in_their_own_order(order):
    setting = Setting(method=Weighted(1.0, 10.0, 100.0))
    setting.fill(*order)
    report = setting.surgery.merge()
    (seen,) = setting.surgery.method.seen
    rows = [
        torch.cat(
            [
                torch.zeros(p.numel()) if g is None else g.flatten()
                for g, p in zip(task, setting.parameters, strict=True)
            ]
        )
        for task in setting.gradients
    ]
    torch.testing.assert_close(seen, reference.gram(torch.stack(rows)))
    torch.testing.assert_close(report.gram, seen)
    setting.assert_grad(
        [
            sum(
                w * task[i]
                for w, task in zip((1.0, 10.0, 100.0), setting.gradients, strict=True)
                if task[i] is not None
            )
            for i in range(3)
        ]
    )


def test_the_plain_mean_as_a_method():
    setting = Setting(method=Weighted(1 / 3, 1 / 3, 1 / 3))
    setting.fill(0, 1, 2)
    assert setting.surgery.merge().coefficients is None
    columns = zip(*setting.gradients, strict=True)
    setting.assert_grad([sum(g for g in column if g is not None) / 3 for column in columns])


@pytest.mark.parametrize(
    "method",
    [Weighted(1.0, 1.0), type("Broken", (methods.Method,), {"solve": lambda self, gram: 1 / 0})()],
    ids=["wrong number of weights", "an exception"],
)
def test_a_method_that_fails_changes_nothing_and_the_round_can_be_merged_by_another(method):
    setting = Setting(method=method)
    setting.loss(2).backward()
    before = snapshot(setting.parameters)
    setting.fill(0, 1, 2)
    with pytest.raises((ValueError, ZeroDivisionError)):
        setting.surgery.merge()
    assert_unchanged(setting.parameters, before)
    setting.surgery.method = methods.PCGrad(FIXED)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1, 2))


KEEPERS = {
    "gradvac": lambda: methods.GradVac(),
    "nash_mtl": lambda: methods.NashMTL(update_weights_every=9),
    "metabalance": lambda: methods.MetaBalance(),
    "pcd": lambda: methods.PCD(),
    "averaged": lambda: methods.CRMOGM(methods.UPGrad()),
    "two batches": lambda: methods.MoDo(1),
}


@pytest.mark.parametrize("granularity", ["parameter", "group", "layer", "collections"])
@pytest.mark.parametrize("method", KEEPERS)
def test_what_is_kept_of_a_problem_is_not_taken_for_that_of_another(method, granularity):
    """Blocks of one shape that are frozen in turns, so that there are as many problems in every step."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    optimizer = torch.optim.SGD([{"params": layer.parameters()} for layer in model], lr=0.1)
    surgery = fastpcgrad.GradientSurgery(
        optimizer,
        2,
        KEEPERS[method](),
        granularity=[list(layer.parameters()) for layer in model] if granularity == "collections" else granularity,
        model=model if granularity == "layer" else None,
        shared=list(model.parameters()),
    )

    def step(frozen):
        for number, layer in enumerate(model):
            layer.requires_grad_(number != frozen)
        outputs = model(torch.ones(1, 2))
        surgery.backward([(outputs - t).square().sum() for t in range(2)])

    step(2), step(2)
    state = surgery.method.state_dict()
    for frozen in (1, 0, None):
        with pytest.raises(ValueError, match=r"keeps something of each of \d problems .*; found \d problems .*reset"):
            step(frozen)
        torch.testing.assert_close(surgery.method.state_dict(), state, rtol=0, atol=0, equal_nan=True)
    step(2)
    surgery.method.reset()
    step(0)


def test_weights_that_are_found_anew_belong_to_no_problem():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    surgery = fastpcgrad.GradientSurgery(model.parameters(), 2, methods.NashMTL(), granularity="layer", model=model)
    for frozen in (2, 0, None):
        for number, layer in enumerate(model):
            layer.requires_grad_(number != frozen)
        outputs = model(torch.ones(1, 2))
        report = surgery.backward([(outputs - t).square().sum() for t in range(2)])
        assert report.weights.shape == (3 - (frozen is not None), 2)


@pytest.mark.parametrize("method", ["gradvac", "metabalance", "pcd", "averaged"])
def test_a_refused_step_does_not_change_whose_state_it_is(method):
    """After a checkpoint was taken up with a block frozen that was not, and with it no longer frozen."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))

    def surgery():
        shared = list(model.parameters())
        return fastpcgrad.GradientSurgery(shared, 2, KEEPERS[method](), granularity="layer", model=model, shared=shared)

    def step(rounds, frozen=None):
        for number, layer in enumerate(model):
            layer.requires_grad_(number != frozen)
        outputs = model(torch.ones(1, 2))
        rounds.backward([(outputs - t).square().sum() for t in range(2)])

    first, resumed = surgery(), surgery()
    step(first)
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"call reset\(\)"):
        step(resumed, frozen=0)
    step(resumed)
    step(first)
    torch.testing.assert_close(resumed.method.state_dict(), first.method.state_dict(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("granularity", ["model", "group", "parameter"])
@pytest.mark.parametrize("change", ["frozen", "order"])
def test_what_is_kept_of_a_parameter_is_not_taken_for_that_of_another(granularity, change):
    """By a method with a problem for each parameter, however these are divided."""
    parameters = [torch.nn.Parameter(torch.ones(2) * n) for n in (1, 2, 3)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)
    surgery = fastpcgrad.GradientSurgery(
        optimizer, 2, methods.CRMOGM(methods.PCGrad("tensorlogic")), granularity=granularity
    )

    def step():
        total = sum((n * p).square().sum() for n, p in enumerate(parameters, start=1))
        surgery.backward([total, -total + parameters[1].sum()])

    parameters[2].requires_grad_(False)
    step(), step()
    state = surgery.method.state_dict()
    if change == "frozen":
        parameters[0].requires_grad_(False)
        parameters[2].requires_grad_(True)
    else:
        optimizer.param_groups.reverse()
    with pytest.raises(ValueError, match=r"keeps something of each of 2 problems .*; found 2 problems .*reset"):
        step()
    torch.testing.assert_close(surgery.method.state_dict(), state, rtol=0, atol=0)
    surgery.method.reset()
    step()


def test_a_checkpoint_of_other_problems_is_taken_up_where_there_were_others():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    shared = list(model.parameters())
    surgery = fastpcgrad.GradientSurgery(
        shared, 2, methods.CRMOGM(methods.UPGrad()), granularity="layer", model=model, shared=shared
    )

    def step(frozen):
        for number, layer in enumerate(model):
            layer.requires_grad_(number != frozen)
        outputs = model(torch.ones(1, 2))
        return surgery.backward([(outputs - t).square().sum() for t in range(2)]).weights

    step(0)
    state = surgery.state_dict()
    expected = step(0)
    surgery.method.reset()
    step(1)
    surgery.load_state_dict(state)
    torch.testing.assert_close(step(0), expected)
