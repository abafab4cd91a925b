"""GradientSurgery: rounds of tasks, what lies in .grad between them, and what errors leave behind."""

import itertools
import random

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference
from tests.linear_problems import Kind, linear_loss, random_problem

FIXED = "tensorflow"
"""A variant that draws nothing, so that the order in which tasks come cannot change its numbers."""


class Weighted(methods.Method):
    """The given weights, whatever the gradients are; remembers the Gram matrices that it saw."""

    def __init__(self, *weights):
        self.given = torch.tensor(weights, dtype=torch.float64)
        self.seen = []

    def solve(self, gram):
        self.seen.append(gram)
        return methods.Solution(self.given, None)


class Setting:
    """Three parameters; task 0, 1 and 2 each conflict with both others; the last parameter is a head of task 2."""

    def __init__(self, dtype=torch.float64, **options):
        self.parameters = [Kind(shape).parameter(dtype) for shape in ((4, 3), (), (5,))]
        values = torch.Generator().manual_seed(7)
        common = [torch.randn(p.shape, generator=values, dtype=torch.float64) for p in self.parameters]
        scattered = [
            [torch.randn(c.shape, generator=values, dtype=torch.float64) - (1 - t) * c for c in common]
            for t in range(3)
        ]
        self.gradients = [[*task[:2], task[2] if t == 2 else None] for t, task in enumerate(scattered)]
        options.setdefault("method", methods.PCGrad(FIXED))
        self.surgery = fastpcgrad.GradientSurgery(options.pop("source", self.parameters), 3, **options)

    def fill(self, *tasks):
        for t in tasks:
            with self.surgery.task(t):
                self.loss(t).backward()

    def loss(self, task):
        return linear_loss(self.parameters, self.gradients[task])

    def oracle(self, *tasks, variant=FIXED, **options):
        chosen = [self.gradients[t] for t in sorted(tasks)]
        return reference.merge(chosen, self.parameters, variant, **options)

    def fails(self, task):
        """Enter a task, run its backward, and leave it by an exception."""
        with pytest.raises(ZeroDivisionError), self.surgery.task(task):
            self.loss(task).backward()
            raise ZeroDivisionError

    def assert_grad(self, expected):
        for p, e in zip(self.parameters, expected, strict=True):
            assert (p.grad is None) == (e is None)
            if e is not None:
                torch.testing.assert_close(p.grad, e.to(p.dtype))


def snapshot(parameters):
    return [(p.grad, None if p.grad is None else p.grad.clone()) for p in parameters]


def assert_unchanged(parameters, before):
    for p, (grad, values) in zip(parameters, before, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, values)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_tasks_may_come_in_any_order(order):
    setting = Setting()
    setting.fill(*order)
    assert setting.surgery.merge().tasks == (0, 1, 2)
    setting.assert_grad(setting.oracle(0, 1, 2))


@pytest.mark.parametrize("present", [(0,), (2,), (0, 1), (1, 2), (2, 0)], ids=str)
def test_absent_tasks_take_no_part(present):
    setting = Setting(method=methods.PCGrad("pytorch-pcgrad", generator=random.Random(1)))
    setting.fill(*present)
    assert setting.surgery.merge().tasks == tuple(sorted(present))
    setting.assert_grad(setting.oracle(*present, variant="pytorch-pcgrad", generator=random.Random(1)))


def test_a_task_that_touches_nothing_is_present_with_a_zero_gradient():
    setting = Setting(method=methods.PCGrad(FIXED, "mean"))
    with setting.surgery.task(0):
        pass
    setting.fill(1)
    report = setting.surgery.merge()
    assert report.tasks == (0, 1)
    assert report.norms[0] == 0
    setting.assert_grad([None if g is None else g / 2 for g in setting.gradients[1]])


def test_a_round_in_which_no_task_touches_anything_leaves_no_gradient():
    setting = Setting()
    with setting.surgery.task(1):
        pass
    setting.surgery.merge()
    setting.assert_grad([None] * 3)


def test_micro_batches_add_up_and_may_alternate_between_tasks():
    setting = Setting()
    for share in (0.25, 0.5, 0.125, 0.125):
        for t in (2, 0, 1):
            with setting.surgery.task(t):
                (setting.loss(t) * share).backward()
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1, 2))


def test_several_backward_passes_inside_one_stay_add_up():
    setting = Setting()
    with setting.surgery.task(0):
        (setting.loss(0) * 0.25).backward()
        (setting.loss(0) * 0.75).backward()
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0))


def test_micro_batches_may_touch_different_parameters():
    setting = Setting()
    first, second, _ = setting.gradients[0]
    for partial in ([first, None, None], [None, second, None]):
        with setting.surgery.task(0):
            linear_loss(setting.parameters, partial).backward()
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0))


def test_rounds_leave_nothing_to_later_rounds():
    """Presence, order and size change from round to round on the same rows."""
    draw = random.Random(2)
    for seed in range(12):
        problem = random_problem(seed)
        parameters, count = problem.parameters(torch.float64), len(problem.gradients)
        rounds = fastpcgrad.GradientSurgery(parameters, count, methods.PCGrad(FIXED))
        for _ in range(4):
            tasks = draw.sample(range(count), draw.randint(1, count))
            # Some gradients are missing this time that were there the last.
            gradients = {t: [g if draw.random() < 0.7 else None for g in problem.gradients[t]] for t in tasks}
            for t in tasks:
                with rounds.task(t):
                    linear_loss(parameters, gradients[t]).backward()
            rounds.merge()
            expected = reference.merge([gradients[t] for t in sorted(tasks)], parameters, FIXED)
            for p, e in zip(parameters, expected, strict=True):
                torch.testing.assert_close(p.grad, e)


@pytest.mark.parametrize("failing", range(3))
def test_an_exception_inside_a_task_makes_it_absent_and_spares_the_others(failing):
    setting = Setting()
    others = [t for t in range(3) if t != failing]
    for t in range(3):
        setting.fails(t) if t == failing else setting.fill(t)
    assert setting.surgery.merge().tasks == tuple(others)
    setting.assert_grad(setting.oracle(*others))


@pytest.mark.parametrize("failing", range(3))
def test_an_exception_in_a_later_micro_batch_drops_the_whole_task(failing):
    setting = Setting()
    setting.fill(0, 1, 2)
    setting.fails(failing)
    others = [t for t in range(3) if t != failing]
    assert setting.surgery.merge().tasks == tuple(others)
    setting.assert_grad(setting.oracle(*others))


@pytest.mark.parametrize("failing", range(3))
def test_a_task_can_be_entered_again_after_an_exception(failing):
    setting = Setting()
    setting.fill(0, 1, 2)
    setting.fails(failing)
    setting.fill(failing)
    assert setting.surgery.merge().tasks == (0, 1, 2)
    setting.assert_grad(setting.oracle(0, 1, 2))


@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("there", range(3))
def test_an_exception_leaves_grad_as_it_was_before_the_task(failing, there):
    setting = Setting()
    setting.parameters[there].grad = torch.randn_like(setting.parameters[there])
    before = snapshot(setting.parameters)
    setting.fails(failing)
    assert_unchanged(setting.parameters, before)


def test_grad_is_set_aside_inside_tasks_and_comes_back_until_merge():
    setting = Setting()
    setting.loss(2).backward()
    before = snapshot(setting.parameters)
    for t in range(3):
        with setting.surgery.task(t):
            assert all(p.grad is None for p in setting.parameters)
            setting.loss(t).backward()
        assert_unchanged(setting.parameters, before)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1, 2))


def test_the_merged_gradient_stays_until_the_next_round_begins():
    setting = Setting()
    setting.fill(0, 1)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1))
    with setting.surgery.task(0):
        assert all(p.grad is None for p in setting.parameters)
    assert all(p.grad is None for p in setting.parameters)


def test_a_clone_of_the_merged_gradient_is_the_users_own():
    setting = Setting()
    setting.fill(0, 1)
    setting.surgery.merge()
    clones = [None if p.grad is None else p.grad.clone() for p in setting.parameters]
    for p, clone in zip(setting.parameters, clones, strict=True):
        p.grad = clone
    before = snapshot(setting.parameters)
    setting.fill(1, 2)
    assert_unchanged(setting.parameters, before)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(1, 2))
    for clone, (_, values) in zip(clones, before, strict=True):
        assert clone is None or torch.equal(clone, values)


def test_backward_outside_of_tasks_adds_to_the_merged_gradient():
    setting = Setting()
    setting.fill(0, 1)
    setting.surgery.merge()
    setting.loss(0).backward()
    expected = setting.oracle(0, 1)
    pairs = zip(expected, setting.gradients[0], strict=True)
    setting.assert_grad([None if e is None else e + g for e, g in pairs])


def test_merged_gradients_zeroed_in_place_do_not_disturb_the_next_round():
    setting = Setting()
    for _ in range(2):
        setting.fill(0, 1, 2)
        for p in setting.parameters:
            if p.grad is not None:
                p.grad.zero_()
        setting.surgery.merge()
        setting.assert_grad(setting.oracle(0, 1, 2))
        for p in setting.parameters:
            p.grad.zero_()


def test_tasks_do_not_nest_and_the_outer_one_survives_the_attempt():
    setting = Setting()
    setting.fill(1)
    with setting.surgery.task(0):
        with pytest.raises(RuntimeError, match=r"task\(1\) inside task\(0\)"), setting.surgery.task(1):
            raise AssertionError("the inner task was entered")
        setting.loss(0).backward()
    assert setting.surgery.merge().tasks == (0, 1)
    setting.assert_grad(setting.oracle(0, 1))


def test_merge_inside_a_task_raises_and_changes_nothing():
    setting = Setting()
    setting.fill(1)
    with setting.surgery.task(0):
        with pytest.raises(RuntimeError, match=r"merge\(\) inside task\(0\)"):
            setting.surgery.merge()
        setting.loss(0).backward()
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1))


def test_discard_inside_a_task_ends_it_with_the_round_and_says_so_where_it_is_left():
    setting = Setting()
    setting.loss(2).backward()
    before = snapshot(setting.parameters)
    setting.fill(1)
    with pytest.raises(RuntimeError, match=r"discard\(\) inside task\(0\)"), setting.surgery.task(0):
        setting.loss(0).backward()
        setting.surgery.discard()
        assert_unchanged(setting.parameters, before)
    setting.fill(0, 2)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 2))


def test_merge_with_no_task_raises_and_keeps_grad():
    setting = Setting()
    setting.loss(2).backward()
    before = snapshot(setting.parameters)
    with pytest.raises(RuntimeError, match="no task"):
        setting.surgery.merge()
    setting.fails(0)
    with pytest.raises(RuntimeError, match="no task"):
        setting.surgery.merge()
    assert_unchanged(setting.parameters, before)


def test_a_second_merge_of_the_same_round_raises_and_keeps_the_merged_gradient():
    setting = Setting()
    setting.fill(0, 1)
    setting.surgery.merge()
    with pytest.raises(RuntimeError, match="no task"):
        setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1))


def test_discard_forgets_the_round_and_keeps_grad():
    setting = Setting()
    setting.loss(2).backward()
    before = snapshot(setting.parameters)
    setting.fill(0, 1)
    setting.surgery.discard()
    assert_unchanged(setting.parameters, before)
    setting.fill(2)
    assert setting.surgery.merge().tasks == (2,)
    setting.assert_grad(setting.oracle(2))


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
