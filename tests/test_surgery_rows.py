"""Rounds on rows of every kind: as autograd left them, converted, summed up in another dtype, on the host."""

import gc
import random
import weakref

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference
from fastpcgrad.rows import host as host_rows
from fastpcgrad.rows.capture import MovedCapture
from tests.late_copies import LateCopies
from tests.linear_problems import linear_loss, random_problem

FIXED = "tensorflow"
"""A variant that draws nothing."""

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16
KINDS = {
    "as they are": {},
    "converted": {"row_dtype": DOUBLE},
    "summed": {"row_dtype": SINGLE, "accumulate_dtype": DOUBLE},
    "host": {"row_device": "cpu"},
    "host, converted": {"row_device": "cpu", "row_dtype": DOUBLE},
    "host, summed": {"row_device": "cpu", "accumulate_dtype": DOUBLE},
}


@pytest.fixture(params=KINDS)
def surgery_for(request, monkeypatch):
    """Makes a GradientSurgery of a kind of rows; those on the host are reached by copies that come late."""
    options = KINDS[request.param]
    if "row_device" in options:
        monkeypatch.setattr(host_rows, "copies_for", lambda device, row_device: LateCopies())

    def build(parameters, tasks, method=None, **more):
        return fastpcgrad.GradientSurgery(parameters, tasks, method or methods.PCGrad(FIXED), **options, **more)

    return build


def run(surgery, parameters, task, gradients, **options):
    with surgery.task(task):
        linear_loss(parameters, gradients).backward(**options)


def assert_grads(parameters, expected):
    for p, e in zip(parameters, expected, strict=True):
        assert (p.grad is None) == (e is None)
        if e is not None:
            assert p.grad.dtype == p.dtype and p.grad.device == p.device
            torch.testing.assert_close(p.grad, e.to(p.dtype), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")  # the cycle that it warns of is broken at once
@pytest.mark.parametrize("create_graph", [False, True])
def test_rounds_with_absent_tasks_micro_batches_and_failures(surgery_for, create_graph):
    """Presence, order and the number of micro-batches change from round to round; one task fails and begins anew."""
    draw = random.Random(3)
    for seed in range(12):
        problem = random_problem(seed, max_tasks=5)
        entries = (float(g.abs().max()) for row in problem.gradients for g in row if g is not None and g.numel())
        scale = max(entries, default=0.0) or 1.0
        given = [[None if g is None else g / scale for g in row] for row in problem.gradients]
        parameters, count = problem.parameters(SINGLE), len(given)
        surgery = surgery_for(parameters, count)
        for _ in range(3):
            tasks = draw.sample(range(count), draw.randint(1, count))
            stays = [t for t in tasks for _ in range(draw.randint(1, 3))]
            draw.shuffle(stays)
            run(surgery, parameters, tasks[0], given[tasks[0]], create_graph=create_graph)
            with pytest.raises(ZeroDivisionError), surgery.task(tasks[0]):
                linear_loss(parameters, given[tasks[0]]).backward(create_graph=create_graph)
                raise ZeroDivisionError
            for t in stays:
                share = [None if g is None else g / stays.count(t) for g in given[t]]
                run(surgery, parameters, t, share, create_graph=create_graph)
            report = surgery.merge()
            assert report.tasks == tuple(sorted(tasks))
            expected = reference.merge([given[t] for t in report.tasks], problem.parameters(DOUBLE), FIXED)
            assert_grads(parameters, expected)
            assert not any(p.grad.requires_grad for p in parameters if p.grad is not None)


def test_the_mean_is_over_the_stays_of_each_task(surgery_for):
    parameters = [torch.zeros(3, 2, requires_grad=True), torch.zeros(5, requires_grad=True)]
    batches = [[[torch.randn(3, 2), torch.randn(5)] for _ in range(count)] for count in (1, 3, 2)]
    batches[1][1][1] = None
    surgery = surgery_for(parameters, 4, accumulate="mean")
    for _ in range(2):
        for t, batch in [(1, 0), (0, 0), (2, 0), (1, 1), (2, 1), (1, 2)]:
            run(surgery, parameters, t, batches[t][batch])
        surgery.merge()
        means = [
            [sum(g for g in column if g is not None) / len(task) for column in zip(*task, strict=True)]
            for task in batches
        ]
        assert_grads(parameters, reference.merge(means, parameters, FIXED))


def test_a_stay_that_failed_does_not_count_for_the_mean(surgery_for):
    p = torch.zeros(3, requires_grad=True)
    surgery = surgery_for([p], 1, accumulate="mean")
    for fails in (False, True, False, False):
        try:
            with surgery.task(0):
                (2 * p).sum().backward()
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
    surgery.merge()
    assert p.grad.tolist() == [2.0] * 3


def test_backward_passes_within_one_stay_add_up_in_the_mean_too(surgery_for):
    p = torch.zeros(3, requires_grad=True)
    surgery = surgery_for([p], 1, accumulate="mean")
    with surgery.task(0):
        p.sum().backward()
        p.sum().backward()
    surgery.merge()
    assert p.grad.tolist() == [2.0] * 3


def test_a_merge_that_fails_does_not_average_twice(surgery_for):
    p = torch.zeros(3, requires_grad=True)
    surgery = surgery_for([p], 2, accumulate="mean")
    for t in (0, 0, 0, 1):
        run(surgery, [p], t, [torch.ones(3)])
    surgery.method = type("Broken", (methods.Method,), {"solve": lambda self, gram: 1 / 0})()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            surgery.merge()
    with pytest.raises(RuntimeError, match=r"task 0 was averaged.*merge\(\) or discard\(\)"), surgery.task(0):
        raise AssertionError("the task was entered")
    surgery.method = methods.PCGrad(FIXED)
    surgery.merge()
    assert p.grad.tolist() == [2.0] * 3


def test_elementwise_methods_and_partial_presence(surgery_for):
    parameters = [torch.zeros(4, requires_grad=True), torch.zeros(2, requires_grad=True)]
    surgery = surgery_for(parameters, 3, methods.TrimmedMean(1))
    for t in range(3):
        run(surgery, parameters, t, [torch.arange(4.0) * (t + 1), torch.ones(2) if t == 2 else None])
    surgery.merge()
    assert parameters[0].grad.tolist() == [0, 2, 4, 6] and parameters[1].grad.tolist() == [0, 0]


@pytest.mark.parametrize("granularity", ["parameter", "collections"])
def test_several_problems_and_parameters_that_are_summed(surgery_for, granularity):
    parameters = [torch.zeros(4, requires_grad=True) for _ in range(4)]
    given = [[torch.randn(4).double() for _ in parameters] for _ in range(3)]
    problems = [[0], [1], [2]] if granularity == "parameter" else [[2, 0], [1]]
    chosen = granularity if granularity == "parameter" else [[parameters[i] for i in each] for each in problems]
    surgery = surgery_for(parameters, 3, granularity=chosen, shared=parameters[:3])
    for t, row in enumerate(given):
        run(surgery, parameters, t, row)
    report = surgery.merge()
    expected = [None, None, None, sum(row[3] for row in given)]
    for problem in problems:
        merged = reference.merge([[row[i] for i in problem] for row in given], [parameters[i] for i in problem], FIXED)
        for i, own in zip(problem, merged, strict=True):
            expected[i] = own
    assert_grads(parameters, expected)
    assert report.weights.shape == (len(problems), 3)


def test_sparse_tied_and_channels_last_parameters(surgery_for):
    embedding = torch.nn.Embedding(6, 4, sparse=True)
    conv = torch.nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
    out = torch.nn.Linear(4, 6, bias=False)
    out.weight = embedding.weight
    tied = [embedding.weight, *conv.parameters()]

    def losses(weight, lookup):
        image = torch.arange(50.0).reshape(1, 2, 5, 5) / 50
        features = conv(image).mean(dim=(2, 3))
        found = lookup(torch.tensor([1, 1, 4])).sum(dim=0)
        return [(features * found).sum(), (features @ weight.t()).square().sum(), -found.sum()]

    dense = embedding.weight.detach().clone().requires_grad_()
    wanted = [
        torch.autograd.grad(loss, [dense, *conv.parameters()], retain_graph=True, allow_unused=True)
        for loss in losses(dense, lambda index: torch.nn.functional.embedding(index, dense))
    ]
    expected = reference.merge([[g if g is None else g.double() for g in row] for row in wanted], tied, FIXED)
    surgery = surgery_for(tied, 3)
    for _ in range(2):
        for t in range(3):
            with surgery.task(t):
                losses(embedding.weight, embedding)[t].backward()
        surgery.merge()
        assert_grads(tied, expected)
        assert all(p.grad.layout == torch.strided and p.grad.stride() == p.stride() for p in tied)


def test_parameters_whose_gradients_are_views_of_one_tensor_accumulate_apart(surgery_for):
    a, b = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    weights = torch.arange(6.0)
    surgery = surgery_for([a, b], 2)
    for t in (0, 1, 0, 1, 0):
        with surgery.task(t):
            ((a.view(-1) + b.view(-1)) * weights).sum().backward()
    report = surgery.merge()
    assert a.grad.flatten().tolist() == b.grad.flatten().tolist() == (5 * weights).tolist()
    assert report.norms.tolist() == pytest.approx([n * (2 * 55) ** 0.5 for n in (3, 2)])


def test_parameters_may_be_frozen_unfrozen_and_added_between_rounds(surgery_for):
    a, b, c = (torch.zeros(width, requires_grad=True) for width in (3, 2, 4))
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    surgery = surgery_for(optimizer, 2)

    def round_of(*parameters):
        for p in (a, b, c):
            p.grad = None
        for t in range(2):
            run(surgery, parameters, t, [torch.ones(p.shape) for p in parameters])
        surgery.merge()
        assert [p.grad is not None for p in (a, b, c)] == [any(p is q for q in parameters) for p in (a, b, c)]
        assert all(p.grad.tolist() == [2.0] * p.numel() for p in parameters)

    round_of(a, b)
    b.requires_grad_(False)
    round_of(a)
    optimizer.add_param_group({"params": [c]})
    round_of(a, c)
    b.requires_grad_(True)
    round_of(a, b, c)
    assert not c._post_accumulate_grad_hooks


def test_gradients_that_are_assigned_inside_a_task_count(surgery_for):
    p = torch.zeros(3, requires_grad=True)
    surgery = surgery_for([p], 1)
    with surgery.task(0):
        p.grad = torch.ones(3)
    surgery.merge()
    assert p.grad.tolist() == [1.0] * 3


def test_a_hook_that_comes_within_a_task_sees_the_gradient(surgery_for):
    p, seen = torch.zeros(3, requires_grad=True), []
    surgery = surgery_for([p], 1)
    with surgery.task(0):
        handle = p.register_post_accumulate_grad_hook(lambda p: seen.extend(p.grad.tolist()))
        (2 * p).sum().backward()
    handle.remove()
    surgery.merge()
    assert seen == p.grad.tolist() == [2.0] * 3


def test_hooks_of_a_surgery_that_is_gone_go_with_the_next_round(surgery_for):
    p = torch.zeros(3, requires_grad=True)
    gone = surgery_for([p], 1)
    gone.task(0).__enter__()
    del gone
    gc.collect()
    surgery = surgery_for([p], 1)
    run(surgery, [p], 0, [torch.ones(3)])
    assert not p._post_accumulate_grad_hooks
    surgery.merge()
    assert p.grad.tolist() == [1.0] * 3


@pytest.mark.parametrize("options", [{"row_dtype": HALF}, {"row_dtype": DOUBLE}])
def test_no_room_for_the_merged_gradient_ends_the_round(options, monkeypatch):
    parameters = [torch.zeros(4, requires_grad=True) for _ in range(3)]
    surgery = fastpcgrad.GradientSurgery(parameters, 2, methods.PCGrad(FIXED), **options)
    give = surgery._layouts.current.capture.rows.give

    def fails(merged):
        yield next(give(merged))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(surgery._layouts.current.capture.rows, "give", fails)
    for _ in range(2):
        run(surgery, parameters, 0, [torch.ones(4)] * 3)
        with pytest.raises(torch.OutOfMemoryError):
            surgery.merge()
        assert_grads(parameters, [None] * 3)
    monkeypatch.undo()
    run(surgery, parameters, 1, [torch.ones(4)] * 3)
    assert surgery.merge().tasks == (1,)
    assert_grads(parameters, [torch.ones(4)] * 3)


def test_what_is_not_finite_reaches_grad_at_its_place(surgery_for):
    p = torch.zeros(4, requires_grad=True)
    surgery = surgery_for([p], 2)
    run(surgery, [p], 0, [torch.tensor([1.0, torch.inf, 2.0, torch.nan])])
    run(surgery, [p], 1, [torch.ones(4)])
    surgery.merge()
    assert p.grad.isfinite().tolist() == [True, False, True, False]


def test_the_merged_gradient_ends_as_the_next_round_begins(surgery_for):
    p = torch.zeros(4, requires_grad=True)
    surgery = surgery_for([p], 1)
    for _ in range(2):
        with surgery.task(0):
            assert p.grad is None
            p.sum().backward()
        assert p.grad is None
        surgery.merge()
        assert p.grad.tolist() == [1.0] * 4


@pytest.mark.parametrize("options", [{"row_dtype": HALF}, {"row_dtype": DOUBLE}])
def test_zero_grad_frees_a_merged_gradient_that_is_no_row(options):
    p = torch.zeros(4, requires_grad=True)
    surgery = fastpcgrad.GradientSurgery([p], 2, **options)
    for t in range(2):
        run(surgery, [p], t, [torch.ones(4)])
    surgery.merge()
    merged = weakref.ref(p.grad)
    p.grad = None
    assert merged() is None
    del surgery
    gc.collect()
    assert not p._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    ("options", "moved"), [({}, False), ({"row_dtype": HALF}, False), ({"row_dtype": SINGLE}, True)]
)
def test_bfloat16_parameters_sum_in_float32_where_that_is_asked_for(options, moved):
    one, little = torch.ones(3), torch.full((3,), 2.0**-9)
    for sums, expected in ((None, 1.0), (SINGLE, 1 + 2.0**-7)):
        p = torch.zeros(3, dtype=HALF, requires_grad=True)
        surgery = fastpcgrad.GradientSurgery([p], 1, accumulate_dtype=sums, **options)
        with surgery.task(0):
            for gradient in [one, *[little] * 4]:
                linear_loss([p], [gradient]).backward()
        surgery.merge()
        assert p.grad.dtype == HALF
        assert p.grad.tolist() == [1 + 2.0**-7 if SINGLE in options.values() else expected] * 3


@pytest.mark.parametrize("options", [{"accumulate_dtype": SINGLE}, {"row_device": "cpu"}, {"row_dtype": SINGLE}])
def test_what_is_the_parameters_own_already_needs_no_hooks(options):
    p = torch.zeros(3, requires_grad=True)
    surgery = fastpcgrad.GradientSurgery([p], 2, **options)
    assert not isinstance(surgery._layouts.current.capture, MovedCapture) and not p._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    ("collections", "error", "words"),
    [
        (lambda a, b: [[a]], ValueError, ["none of the 1 collections", "[2, 3]"]),
        (lambda a, b: [], ValueError, ["none of the 0 collections", "[5]"]),
        (lambda a, b: [[a, b], [b]], ValueError, ["granularity[0]", "granularity[1]", "[2, 3]"]),
        (lambda a, b: [[a, b], [torch.zeros(7, requires_grad=True)]], ValueError, ["granularity[1]", "[7]"]),
        (lambda a, b: [a, b], TypeError, ["granularity[0]", "single tensor"]),
        (lambda a, b: [["weight"]], TypeError, ["granularity[0]", "str"]),
        (lambda a, b: 3, ValueError, ["granularity", "3"]),
    ],
)
def test_collections_hold_every_parameter_once(collections, error, words):
    a, b = torch.zeros(5, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(error) as caught:
        fastpcgrad.GradientSurgery([a, b], 2, granularity=collections(a, b))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_collection_may_hold_frozen_parameters_and_one_that_is_added_must_be_in_one():
    a, b, c = (torch.zeros(width, requires_grad=width != 3) for width in (2, 3, 4))
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    surgery = fastpcgrad.GradientSurgery(optimizer, 1, granularity=[iter([a]), iter([b])])
    run(surgery, [a], 0, [torch.ones(2)])
    assert surgery.merge().weights.shape == (1, 1)
    b.requires_grad_(True)
    run(surgery, [a, b], 0, [torch.ones(2), torch.ones(3)])
    assert surgery.merge().weights.shape == (2, 1)
    optimizer.add_param_group({"params": [c]})
    with pytest.raises(ValueError, match=r"\[4\] is in none"), surgery.task(0):
        raise AssertionError("the task was entered")
