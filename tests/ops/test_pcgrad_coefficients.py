"""pcgrad_coefficients: the projections on the Gram matrix."""

import itertools
from functools import cache

import pytest
import torch

import fastpcgrad
from fastpcgrad import reference, variants
from fastpcgrad.backends import cpu, kernels
from fastpcgrad.variants import Guards
from tests.ops import cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GUARDS = sorted({v.guards for v in variants.VARIANTS.values()})


def gram_and_order(tasks, batch=(), seed=0):
    generator = torch.Generator().manual_seed(seed + tasks)
    rows = torch.randn(*batch, tasks, 4, generator=generator, dtype=torch.float64)
    order = torch.rand(*batch, tasks, tasks, generator=generator).argsort(dim=-1)
    return rows @ rows.mT, order


def raw(gram, order, self_projection=False, eps=0.0, min_squared_norm=0.0):
    """The kernel itself, as a GPU's tensors reach it: nobody looks at the numbers of the order before."""
    return kernels.pcgrad_coefficients(gram, order, self_projection, eps, min_squared_norm)


def assert_same(found, expected, gram):
    """Equal to rounding, in units of ‖g_i‖ / ‖g_j‖."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    difference = (found - expected).abs() * norms[..., None, :]
    assert found.dtype == torch.float64 and found.shape == expected.shape
    assert bool((difference <= 1e-12 * norms[..., :, None]).all())


@cache
def exact(tasks, *guards):
    return reference.coefficients(*gram_and_order(tasks), *guards)


@pytest.mark.parametrize("guards", GUARDS, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 17])
def test_is_the_oracles(backend, tasks, guards):
    gram, order = gram_and_order(tasks)
    assert_same(raw(gram, order, *guards), exact(tasks, *guards), gram)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_is_the_oracles_on_triton(backend, tasks):
    gram, order = gram_and_order(tasks)
    assert_same(fastpcgrad.pcgrad_coefficients(gram, order), reference.coefficients(gram, order), gram)


def test_thirty_three_tasks(backend):
    gram, order = gram_and_order(33)
    assert_same(fastpcgrad.pcgrad_coefficients(gram, order), exact(33), gram)


def test_keywords_are_the_guards_of_the_oracle(backend):
    gram, order = gram_and_order(5)
    guards = {"self_projection": True, "eps": 0.5, "min_squared_norm": float(gram.diagonal().median())}
    expected = reference.coefficients(gram, order, **guards)
    assert_same(fastpcgrad.pcgrad_coefficients(gram, order, **guards), expected, gram)
    assert not torch.equal(expected, reference.coefficients(gram, order))


@pytest.mark.parametrize("shared_order", [True, False])
def test_problems_of_a_batch_are_independent(backend, shared_order):
    grams, orders = gram_and_order(5, batch=(4,))
    orders = orders[:1].expand(4, -1, -1) if shared_order else orders
    found = fastpcgrad.pcgrad_coefficients(grams, orders[0] if shared_order else orders)
    for gram, order, matrix in zip(grams, orders, found, strict=True):
        assert torch.equal(matrix, fastpcgrad.pcgrad_coefficients(gram, order))


def test_inputs_may_be_strided(backend):
    grams, orders = gram_and_order(6, batch=(3,))
    wide = torch.full((3, 6, 12), torch.nan, dtype=torch.float64)
    wide[..., ::2] = grams
    strided = orders.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    expected = fastpcgrad.pcgrad_coefficients(grams, orders)
    assert torch.equal(fastpcgrad.pcgrad_coefficients(wide[..., ::2], strided), expected)


def test_leaves_its_inputs_alone(backend):
    gram, order = gram_and_order(6)
    before = gram.clone(), order.clone()
    fastpcgrad.pcgrad_coefficients(gram, order)
    assert torch.equal(gram, before[0]) and torch.equal(order, before[1])


def test_zero_gradients_take_no_part(backend):
    gram = torch.zeros(4, 4, dtype=torch.float64)
    _, order = gram_and_order(4)
    assert torch.equal(fastpcgrad.pcgrad_coefficients(gram, order), torch.eye(4, dtype=torch.float64))


def test_a_task_at_the_floor_takes_no_part(backend):
    gram = torch.tensor([[4.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    order = torch.tensor([[0, 1], [0, 1]])
    found = fastpcgrad.pcgrad_coefficients(gram, order, min_squared_norm=2.0)
    assert found.tolist() == [[1.0, 0.0], [0.25, 1.0]]


def test_nan_in_one_task_leaves_the_others_as_without_it(backend):
    gram, order = gram_and_order(5)
    good = torch.tensor([0, 1, 3, 4])
    expected = reference.coefficients(gram[good][:, good], without(order, 2))
    gram[2] = gram[:, 2] = torch.nan
    found = fastpcgrad.pcgrad_coefficients(gram, order)
    assert_same(found[good][:, good], expected, gram[good][:, good])
    assert found[good, 2].tolist() == [0] * 4 and found[2].tolist() == [0, 0, 1, 0, 0]


def without(order, task):
    """The order of the other tasks among themselves, renumbered."""
    rows = [[j - (j > task) for j in row if j != task] for row in order.tolist()]
    return torch.tensor([row for i, row in enumerate(rows) if i != task])


@pytest.mark.parametrize(
    ("dot", "squared_norm"), [(-torch.inf, 1.0), (torch.nan, 1.0), (-1.0, torch.inf), (-1.0, torch.nan), (-1.0, 0.0)]
)
def test_a_projection_that_is_not_finite_is_left_out(backend, dot, squared_norm):
    gram = torch.tensor([[1.0, dot], [dot, squared_norm]], dtype=torch.float64)
    order = torch.tensor([[0, 1], [1, 0]])
    found = fastpcgrad.pcgrad_coefficients(gram, order)
    assert found[0].tolist() == [1, 0] and found[1, 1] == 1 and found.isfinite().all()


@pytest.mark.parametrize("scale", [1e-120, 1e-60, 1e60, 1e120])
def test_scales_that_only_float64_holds(backend, scale):
    gram, order = gram_and_order(8)
    expected = fastpcgrad.pcgrad_coefficients(gram, order)
    assert_same(fastpcgrad.pcgrad_coefficients(gram * scale**2, order), expected, gram)


@pytest.mark.parametrize("index", [-1, 3, 2**40, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("self_projection", [False, True])
def test_an_index_out_of_range_makes_its_row_nan_and_no_other(backend, index, self_projection):
    gram, order = gram_and_order(3)
    expected = raw(gram, order, self_projection)
    order[1, 2] = index
    found = raw(gram, order, self_projection)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_an_index_out_of_range_spoils_its_own_problem_of_a_batch_only(backend):
    grams, orders = gram_and_order(3, batch=(4,))
    expected = raw(grams, orders)
    orders[2, 0, 1] = 7
    found = raw(grams, orders)
    assert torch.equal(found.isnan().any(dim=2).nonzero(), torch.tensor([[2, 0]]))
    assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


def test_a_task_named_twice_is_projected_away_from_twice(backend):
    # Not what functional lets through, but what the kernel does is defined: the order is followed literally.
    gram, _ = gram_and_order(3)
    for places in itertools.product(range(3), repeat=3):
        order = torch.tensor([places] * 3)
        assert_same(raw(gram, order), reference.coefficients(gram, order), gram)


@pytest.mark.parametrize("case", [cases.Case(8, 1000, torch.float32)], ids=str)
def test_projected_rows_agree_with_the_vector_space(backend, case):
    rows, order = cases.rows_of(case).double(), cases.order_of(case)
    found = fastpcgrad.pcgrad_coefficients(reference.gram(rows), order) @ rows
    for i, row in enumerate(rows):
        for j in order[i]:
            dot = row @ rows[j]
            if j != i and dot < 0:
                row = row - dot / (rows[j] @ rows[j]) * rows[j]
        torch.testing.assert_close(found[i], row, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_threads_change_no_bit(backend, with_threads, batch):
    gram, order = gram_and_order(133, batch)
    one, several = (with_threads(threads, lambda: raw(gram, order)) for threads in (1, 3))
    assert torch.equal(one, several)


@pytest.mark.parametrize("guards", [Guards(), Guards(True, 1e-3, 0.0)])
def test_instruction_sets_change_no_bit(guards):
    if cpu.why_unavailable("cpu") is not None or cpu.isa() == "baseline":
        pytest.skip("there is one instruction set")
    gram, order = gram_and_order(133)
    own = cpu.isa()
    found = cpu.pcgrad_coefficients(gram, order, guards)
    try:
        cpu.use_isa("baseline")
        assert torch.equal(cpu.pcgrad_coefficients(gram, order, guards), found)
    finally:
        cpu.use_isa(own)
