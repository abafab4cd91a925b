"""merge: rows and a method to one merged gradient, with any presence, scope and grouping, against the oracle."""

import itertools
import random

import pytest
import torch

from fastpcgrad import methods, reference, variants
from fastpcgrad.merging.by_rows import merge
from fastpcgrad.rows.parameters import Division
from fastpcgrad.rows.task_gradients import TaskGradients
from tests.linear_problems import random_problem

for_every_variant = pytest.mark.parametrize("variant", list(variants.VARIANTS))


def captured(problem, order=None):
    """The problem's gradients as rows, in the order in which the tasks come."""
    grads = TaskGradients(problem.parameters(torch.float64))
    for t in range(len(problem.gradients)) if order is None else order:
        grads.put(t, [None if g is None else g.clone() for g in problem.gradients[t]])
    return grads


def merged(grads, method, in_place=False, **options):
    """The report, and for each parameter its merged gradient or None."""
    return merge(grads, method, Division(**options), in_place=in_place)


def assert_all_close(found, expected):
    assert [f is None for f in found] == [e is None for e in expected]
    for f, e in zip(found, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)


def rows_inside(problem, inside):
    return torch.stack(
        [
            torch.cat(
                [torch.zeros(0, dtype=torch.float64)]
                + [
                    (torch.zeros(kind.shape, dtype=torch.float64) if g is None else g).flatten()
                    for g, kind, chosen in zip(task, problem.kinds, inside, strict=True)
                    if chosen
                ]
            )
            for task in problem.gradients
        ]
    )


@for_every_variant
def test_the_order_in_which_rows_came_makes_no_difference(variant):
    for seed in range(40):
        problem = random_problem(seed, max_tasks=6)
        order = random.Random(seed).sample(range(len(problem.gradients)), len(problem.gradients))
        report, found = merged(captured(problem, order), methods.PCGrad(variant, generator=random.Random(seed)))
        expected = reference.merge(problem.gradients, problem.parameters(torch.float64), variant, random.Random(seed))
        assert report.tasks == tuple(range(len(problem.gradients)))
        assert_all_close(found, expected)


@for_every_variant
def test_the_merged_gradient_may_be_written_over_the_rows(variant):
    for seed in range(20):
        problem = random_problem(seed, max_tasks=6)
        grads = captured(problem)
        _, found = merged(grads, methods.PCGrad(variant, generator=random.Random(1)), in_place=True)
        expected = reference.merge(problem.gradients, problem.parameters(torch.float64), variant, random.Random(1))
        assert_all_close(found, expected)


@pytest.mark.parametrize("variant", [name for name, v in variants.VARIANTS.items() if v.scope != "parameter"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_groups_are_problems_of_their_own(variant, reduction):
    """Each group draws an order of its own, in the order of the groups."""
    for seed in range(40):
        problem = random_problem(seed, max_tasks=6)
        draw, parameters = random.Random(seed), problem.parameters(torch.float64)
        groups = [draw.randrange(3) for _ in parameters]
        groups = [sorted(set(groups)).index(g) for g in groups]
        method = methods.PCGrad(variant, reduction, random.Random(seed))
        _, found = merged(captured(problem), method, groups=groups)
        generator, expected = random.Random(seed), [None] * len(parameters)
        for group in range(max(groups) + 1):
            inside = [p for p, g in enumerate(groups) if g == group]
            tasks = [[task[p] for p in inside] for task in problem.gradients]
            pieces = reference.merge(tasks, [parameters[p] for p in inside], variant, generator, reduction)
            for p, piece in zip(inside, pieces, strict=True):
                expected[p] = piece
        assert_all_close(found, expected)
        if variant != "libmtl":  # whose last groups may hold nothing that every task touches
            assert method.generator.getstate() == generator.getstate()


@for_every_variant
def test_the_reports_gram_spans_what_underwent_surgery(variant):
    for seed in range(40):
        problem = random_problem(seed, max_tasks=6)
        everywhere = [all(g is not None for g in column) for column in zip(*problem.gradients, strict=True)]
        inside = everywhere if variant == "libmtl" else [True] * len(everywhere)
        report, _ = merged(captured(problem), methods.PCGrad(variant))
        torch.testing.assert_close(report.gram, reference.gram(rows_inside(problem, inside)), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("shared", list(itertools.product((False, True), repeat=3)), ids=str)
def test_what_is_not_shared_is_summed(shared):
    for seed in range(20):
        problem = random_problem(seed, max_tasks=4)
        inside = [shared[p % 3] for p in range(len(problem.kinds))]
        report, found = merged(captured(problem), methods.PCGrad("tensorflow"), shared=inside)
        chosen = [p for p, there in enumerate(inside) if there]
        parameters = problem.parameters(torch.float64)
        assert_all_close(found, reference.merge(problem.gradients, parameters, "tensorflow", shared=chosen))
        torch.testing.assert_close(report.gram, reference.gram(rows_inside(problem, inside)), rtol=1e-9, atol=0.0)


def test_what_no_task_touches_has_no_gradient_and_what_one_touches_has_one():
    class Sum(methods.Method):
        def solve(self, gram):
            return methods.Solution(torch.ones(gram.shape[:-1], dtype=torch.float64), None)

    for seed in range(40):
        problem = random_problem(seed)
        _, found = merged(captured(problem), Sum())
        columns = zip(*problem.gradients, strict=True)
        present = [[g for g in column if g is not None] for column in columns]
        assert_all_close(found, [sum(column) if column else None for column in present])


@for_every_variant
def test_a_non_finite_gradient_stays_at_its_place(variant):
    """It reaches the merged gradient there; where the tests skip it, the other columns stay finite."""
    widths = [24, 8]
    rows = torch.randn(4, sum(widths), dtype=torch.float64)
    for value in (torch.nan, torch.inf, -torch.inf):
        rows[2, 5] = value
        gradients = [list(row.split(widths)) for row in rows]
        grads = TaskGradients(gradients[0])
        for t, task in enumerate(gradients):
            grads.put(t, list(task))
        _, found = merged(grads, methods.PCGrad(variant))
        finite = torch.cat(found).isfinite()
        assert finite.logical_not().nonzero().flatten().tolist() == [5]


class Witness(methods.Mean):
    """Notes which tasks it was told of."""

    tasks = None

    def solve_for(self, gram, tasks):
        self.tasks = tuple(tasks)
        return super().solve_for(gram, tasks)


@pytest.mark.parametrize("scope", ["all", "shared", "parameter"])
@pytest.mark.parametrize("partial", [False, True])
def test_a_method_is_told_which_tasks_there_are(scope, partial):
    parameters = [torch.zeros(2), torch.zeros(3)]
    grads = TaskGradients(parameters)
    for t in (4, 1):
        grads.put(t, [torch.ones(2), None if partial and t == 4 else torch.ones(3)])
    method = Witness()
    method.scope = scope
    report, _ = merged(grads, method)
    assert method.tasks == (1, 4) == report.tasks
