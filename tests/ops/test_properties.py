"""What holds for all gradients: found by hypothesis among small integers, where degenerate cases abound."""

import pytest
import torch

import fastpcgrad
from fastpcgrad import reference

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

prop = hypothesis.settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    # The backend stays the same for all examples of a test.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@st.composite
def problems(draw, max_tasks=6):
    """J of small integers, so that zeros, duplicates and exact opposites are frequent, and an order."""
    tasks, width = draw(st.integers(1, max_tasks)), draw(st.integers(1, 5))
    row = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    rows = draw(st.lists(row, min_size=tasks, max_size=tasks))
    order = [draw(st.permutations(range(tasks))) for _ in range(tasks)]
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(order)


def solve(rows, order, **guards):
    return fastpcgrad.pcgrad_coefficients(fastpcgrad.gram(rows), order, **guards)


@hypothesis.given(problems())
@prop
def test_coefficients_are_bounded_without_self_projection(backend, problem):
    rows, order = problem
    matrix, norms = solve(rows, order), rows.double().norm(dim=1)
    assert torch.equal(matrix.diagonal(), torch.ones(len(rows), dtype=torch.float64))
    assert bool((matrix >= 0).all())
    assert bool((matrix * norms <= norms[:, None] * (1 + 1e-12) + torch.diag(norms) * 1e-12).all())


@hypothesis.given(problems(), st.booleans(), st.sampled_from([0.0, 1e-8, 1.0]), st.sampled_from([0.0, 2.0]))
@prop
def test_coefficients_are_the_oracles(backend, problem, self_projection, eps, min_squared_norm):
    rows, order = problem
    guards = {"self_projection": self_projection, "eps": eps, "min_squared_norm": min_squared_norm}
    expected = reference.coefficients(reference.gram(rows), order, **guards)
    torch.testing.assert_close(solve(rows, order, **guards), expected, rtol=0, atol=1e-12)


@hypothesis.given(problems(), st.booleans())
@prop
def test_no_projected_gradient_is_longer_than_its_own(backend, problem, self_projection):
    rows, order = problem
    projected = solve(rows, order, self_projection=self_projection) @ rows.double()
    assert bool((projected.norm(dim=1) <= rows.double().norm(dim=1) + 1e-9).all())


@hypothesis.given(problems())
@prop
def test_no_projected_gradient_opposes_the_last_task_of_its_order(backend, problem):
    rows, order = problem
    rows, projected = rows.double(), solve(rows, order) @ rows.double()
    for i, last in enumerate(order[:, -1]):
        assert i == last or projected[i] @ rows[last] >= -1e-9


@hypothesis.given(problems(max_tasks=2))
@prop
def test_two_tasks_end_up_without_conflict(backend, problem):
    rows, order = problem
    projected = fastpcgrad.pcgrad_(rows.clone(), order=order)
    assert bool((projected @ rows.mT >= -1e-5).all())


@hypothesis.given(problems(), st.integers(-30, 30))
@prop
def test_merged_gradients_scale_with_powers_of_two_to_the_bit(backend, problem, exponent):
    rows, order = problem
    scale = 2.0**exponent
    expected = fastpcgrad.pcgrad(rows, order=order) * scale
    assert torch.equal(fastpcgrad.pcgrad(rows * scale, order=order), expected)


@hypothesis.given(problems(), st.data())
@prop
def test_the_scale_of_a_task_changes_no_other_projected_gradient_to_the_bit(backend, problem, data):
    rows, order = problem
    exponents = data.draw(st.lists(st.integers(-15, 15), min_size=len(rows), max_size=len(rows)))
    scales = 2.0 ** torch.tensor(exponents, dtype=torch.float32)[:, None]
    expected = fastpcgrad.pcgrad_(rows.clone(), order=order) * scales
    assert torch.equal(fastpcgrad.pcgrad_(rows * scales, order=order), expected)


@hypothesis.given(problems(), st.data())
@prop
def test_renaming_the_tasks_renames_the_coefficients_to_the_bit(backend, problem, data):
    rows, order = problem
    names = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    renamed_order = names.argsort()[order[names]]
    assert torch.equal(solve(rows[names], renamed_order), solve(rows, order)[names][:, names])


@hypothesis.given(problems())
@prop
def test_adding_a_zero_gradient_changes_nothing(backend, problem):
    rows, order = problem
    tasks = len(rows)
    more = torch.cat([rows, torch.zeros_like(rows[:1])])
    longer = torch.nn.functional.pad(order, (1, 0), value=tasks)
    longer = torch.cat([longer, torch.arange(tasks + 1)[None]])
    assert torch.equal(solve(more, longer)[:tasks, :tasks], solve(rows, order))
    torch.testing.assert_close(fastpcgrad.pcgrad(more, order=longer), fastpcgrad.pcgrad(rows, order=order))


@hypothesis.given(problems(), st.data())
@prop
def test_segments_are_problems_of_their_own(backend, problem, data):
    rows, order = problem
    width = rows.shape[1]
    cut = data.draw(st.integers(0, width))
    found = fastpcgrad.pcgrad(rows, order=order, segments=[0, cut, width])
    parts = [fastpcgrad.pcgrad(part, order=order) for part in (rows[:, :cut], rows[:, cut:])]
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-6, atol=1e-6)
