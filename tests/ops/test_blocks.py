"""Task gradients that lie where autograd put them: gram, combine and the whole surgery on blocks of columns."""

import random
from dataclasses import dataclass

import pytest
import torch

from fastpcgrad import reference
from fastpcgrad._ops import KERNELS
from fastpcgrad.task_gradients import TaskGradients
from tests.conftest import BACKENDS
from tests.ops import cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = ((5,), (), (0,), (3, 7), (64,), (2, 0), (40, 50), (129,))
in_each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


@dataclass
class Scattered:
    """T gradients of a few parameters, some absent, and the same as one J with zeros."""

    grads: TaskGradients
    rows: torch.Tensor
    presence: list[list[bool]]

    @property
    def blocks(self):
        return self.grads.blocks()

    def columns(self, block):
        first = sum(self.blocks.widths[:block])
        return slice(first, first + self.blocks.widths[block])


def scattered(seed, dtype, tasks=None, shapes=SHAPES, scale=1.0, absent=0.3):
    draw, values = random.Random(seed), torch.Generator().manual_seed(seed)
    tasks = tasks or draw.randint(1, 6)
    grads = TaskGradients([torch.zeros(shape, dtype=dtype) for shape in shapes])
    rows, presence = [], []
    for t in range(tasks):
        there = [draw.random() >= absent for _ in shapes]
        task = [(torch.randn(shape, generator=values) * scale).to(dtype) for shape in shapes]
        rows.append(torch.cat([g.flatten() * here for g, here in zip(task, there, strict=True)]))
        presence.append(there)
        grads.put(t, [g if here else None for g, here in zip(task, there, strict=True)])
    return Scattered(grads, torch.stack(rows), presence)


def places(blocks):
    """For each block the first row that is there."""
    return [next((row for row in column if row is not None), None) for column in zip(*blocks.tensors, strict=True)]


def gram_error(found, rows):
    """The largest |G − G₆₄|_ij / (‖g_i‖ ‖g_j‖)."""
    exact = reference.gram(rows)
    norms = exact.diagonal().sqrt()
    distance = (found - exact).abs()
    return float(torch.where(distance == 0, 0.0, distance / (norms[:, None] * norms)).max())


@cases.on_all_backends
@in_each_dtype
def test_gram_is_the_oracles(backend, dtype):
    for seed in range(12):
        problem = scattered(seed, dtype)
        found = KERNELS["gram_blocks"](problem.blocks, None, 1)
        assert found.shape == (1, len(problem.rows), len(problem.rows)) and found.dtype == torch.float64
        assert gram_error(found[0], problem.rows) <= cases.GRAM_TOLERANCE[dtype]
        assert torch.equal(found[0], found[0].mT)


@cases.on_all_backends
def test_blocks_count_for_their_problem_only(backend):
    for seed in range(12):
        problem, draw = scattered(seed, torch.float64), random.Random(seed)
        owners = [draw.randrange(-1, 3) for _ in SHAPES]
        found = KERNELS["gram_blocks"](problem.blocks, owners, 3)
        for number in range(3):
            inside = [problem.rows[:, problem.columns(b)] for b, owner in enumerate(owners) if owner == number]
            expected = torch.cat([problem.rows[:, :0], *inside], dim=1)
            assert gram_error(found[number], expected) <= 1e-13


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e18])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gram_holds_what_fp32_squares_do_not(backend, scale):
    problem = scattered(3, torch.float32, tasks=4, scale=scale)
    assert gram_error(KERNELS["gram_blocks"](problem.blocks, None, 1)[0], problem.rows) <= 1e-6


@pytest.mark.parametrize("scale", cases.SUBNORMAL_SQUARES)
@cases.on_all_backends
def test_gram_holds_what_fp32_squares_hold_but_in_part(backend, scale):
    rows = cases.rows_of_one_size(3, 2000, scale)
    rows[1] /= scale
    grads = TaskGradients([torch.zeros(1300), torch.zeros(700)])
    for t, row in enumerate(rows):
        grads.put(t, list(row.clone().split([1300, 700])))
    assert gram_error(KERNELS["gram_blocks"](grads.blocks(), None, 1)[0], rows) <= 1e-6


@cases.on_all_backends
@in_each_dtype
@pytest.mark.parametrize("in_place", [False, True])
def test_combine_takes_each_blocks_own_weights(backend, dtype, in_place):
    for seed in range(12):
        problem, draw = scattered(seed, dtype), random.Random(seed)
        weights = torch.randn(3, len(problem.rows), dtype=torch.float64)
        chosen = [draw.randrange(3) for _ in SHAPES]
        firsts = places(problem.blocks)
        out = firsts if in_place else [None if p is None else torch.full_like(p, torch.nan) for p in firsts]
        KERNELS["combine_blocks"](problem.blocks, weights, chosen, out)
        for b, merged in enumerate(out):
            if merged is None:
                assert not any(task[b] for task in problem.presence)
                continue
            rows = problem.rows[:, problem.columns(b)]
            assert cases.error(merged.flatten(), rows, weights[chosen[b]]) <= cases.ROW_TOLERANCE[dtype]


@cases.on_all_backends
@in_each_dtype
def test_the_whole_surgery_is_gram_solve_and_combine(backend, dtype):
    for seed in range(12):
        problem = scattered(seed, dtype)
        tasks = len(problem.rows)
        order = torch.rand(tasks, tasks).argsort(dim=1)
        out = places(problem.blocks)
        gram, weights, coefficients, _ = KERNELS["pcgrad_blocks"](problem.blocks, order, True, 0.0, 0.0, 0.5, out)()
        assert gram_error(gram, problem.rows) <= cases.GRAM_TOLERANCE[dtype]
        exact = reference.coefficients(reference.gram(problem.rows), order, True, 0.0, 0.0)
        torch.testing.assert_close(coefficients, exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights, 0.5 * coefficients.sum(dim=0))
        for b, merged in enumerate(out):
            if merged is not None:
                rows = problem.rows[:, problem.columns(b)]
                assert cases.error(merged.flatten(), rows, weights) <= cases.ROW_TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(backend, dtype, with_threads):
    def merged():
        problem = scattered(5, dtype, tasks=5, shapes=((300, 301), (7,), (200_003,)), absent=0.2)
        out = places(problem.blocks)
        order = torch.arange(5).repeat(5, 1)
        return [*KERNELS["pcgrad_blocks"](problem.blocks, order, False, 0.0, 0.0, 1.0, out)()[:3], *out]

    once = with_threads(1, merged)
    for threads in (2, 3, 5):
        for a, b in zip(once, with_threads(threads, merged), strict=True):
            assert a is b is None or torch.equal(a, b)


@cases.on_all_backends
def test_a_task_that_does_not_touch_a_parameter_cannot_spoil_it(backend):
    """Its weight may be NaN: there is nothing that it could be multiplied with."""
    problem = scattered(1, torch.float32, tasks=3, shapes=((4,), (6,)), absent=0.0)
    row = problem.grads.take(1)
    problem.grads.put(1, [None, torch.full((6,), torch.inf)])
    out = [torch.empty(4), torch.empty(6)]
    KERNELS["combine_blocks"](problem.blocks, torch.tensor([[1.0, torch.nan, 2.0]], dtype=torch.float64), None, out)
    assert row is not None and out[0].isfinite().all() and out[1].isnan().all()


@cases.on_all_backends
def test_autograd_notices_what_is_written(backend):
    problem = scattered(2, torch.float32, tasks=2, shapes=((4,),), absent=0.0)
    (place,) = out = places(problem.blocks)
    loss = (torch.ones(4, requires_grad=True) * place).sum()
    KERNELS["combine_blocks"](problem.blocks, torch.ones(1, 2, dtype=torch.float64), None, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
