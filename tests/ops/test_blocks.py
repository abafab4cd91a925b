"""Task gradients that lie where autograd put them: gram, combine and the whole surgery on blocks of columns."""

import random
from array import array
from dataclasses import dataclass

import pytest
import torch

from fastpcgrad import reference
from fastpcgrad._blocks import Blocks
from fastpcgrad.backends import kernels, stacked
from fastpcgrad.rows.task_gradients import TaskGradients
from fastpcgrad.variants import Guards
from tests.conftest import BACKENDS
from tests.ops import cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = ((5,), (), (0,), (3, 7), (64,), (2, 0), (40, 50), (129,))
SEEDS = {"triton": 3}
"""Of the problems with a backend, else 12: an interpreter is slow."""
in_each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


@dataclass
class Scattered:
    """T gradients of a few parameters, some absent, and the same as one J with zeros."""

    grads: TaskGradients
    rows: torch.Tensor
    presence: list[list[bool]]

    @property
    def blocks(self):
        return self.grads.columns().whole

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
    for seed in range(SEEDS.get(backend, 12)):
        problem = scattered(seed, dtype)
        found = kernels.gram_blocks(problem.blocks, None, 1)
        assert found.shape == (1, len(problem.rows), len(problem.rows)) and found.dtype == torch.float64
        assert gram_error(found[0], problem.rows) <= cases.GRAM_TOLERANCE[dtype]
        assert torch.equal(found[0], found[0].mT)


@cases.on_all_backends
def test_blocks_count_for_their_problem_only(backend):
    for seed in range(SEEDS.get(backend, 12)):
        problem, draw = scattered(seed, torch.float64), random.Random(seed)
        owners = [draw.randrange(-1, 3) for _ in SHAPES]
        found = kernels.gram_blocks(problem.blocks, owners, 3)
        for number in range(3):
            inside = [problem.rows[:, problem.columns(b)] for b, owner in enumerate(owners) if owner == number]
            expected = torch.cat([problem.rows[:, :0], *inside], dim=1)
            assert gram_error(found[number], expected) <= 1e-13


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e18])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gram_holds_what_fp32_squares_do_not(backend, scale):
    problem = scattered(3, torch.float32, tasks=4, scale=scale)
    assert gram_error(kernels.gram_blocks(problem.blocks, None, 1)[0], problem.rows) <= 1e-6


@pytest.mark.parametrize("scale", cases.SUBNORMAL_SQUARES)
@cases.on_all_backends
def test_gram_holds_what_fp32_squares_hold_but_in_part(backend, scale):
    rows = cases.rows_of_one_size(3, 2000, scale)
    rows[1] /= scale
    grads = TaskGradients([torch.zeros(1300), torch.zeros(700)])
    for t, row in enumerate(rows):
        grads.put(t, list(row.clone().split([1300, 700])))
    assert gram_error(kernels.gram_blocks(grads.columns().whole, None, 1)[0], rows) <= 1e-6


@cases.on_all_backends
@in_each_dtype
@pytest.mark.parametrize("in_place", [False, True])
def test_combine_takes_each_blocks_own_weights(backend, dtype, in_place):
    for seed in range(SEEDS.get(backend, 12)):
        problem, draw = scattered(seed, dtype), random.Random(seed)
        weights = torch.randn(3, len(problem.rows), dtype=torch.float64)
        chosen = [draw.randrange(3) for _ in SHAPES]
        firsts = places(problem.blocks)
        out = firsts if in_place else [None if p is None else torch.full_like(p, torch.nan) for p in firsts]
        kernels.combine_blocks(problem.blocks, weights, chosen, out)
        for b, merged in enumerate(out):
            if merged is None:
                assert not any(task[b] for task in problem.presence)
                continue
            rows = problem.rows[:, problem.columns(b)]
            assert cases.error(merged.flatten(), rows, weights[chosen[b]]) <= cases.ROW_TOLERANCE[dtype]


@cases.on_all_backends
@in_each_dtype
def test_the_whole_surgery_is_gram_solve_and_combine(backend, dtype):
    for seed in range(SEEDS.get(backend, 12)):
        problem = scattered(seed, dtype)
        tasks = len(problem.rows)
        order = torch.rand(tasks, tasks).argsort(dim=1)
        out = places(problem.blocks)
        gram, weights, coefficients, _ = kernels.pcgrad_blocks(
            problem.blocks, order, Guards(self_projection=True), 0.5, out
        )()
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
        return [*kernels.pcgrad_blocks(problem.blocks, order, Guards(), 1.0, out)()[:3], *out]

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
    kernels.combine_blocks(problem.blocks, torch.tensor([[1.0, torch.nan, 2.0]], dtype=torch.float64), None, out)
    assert row is not None and out[0].isfinite().all() and out[1].isnan().all()


@cases.on_all_backends
def test_autograd_notices_what_is_written(backend):
    problem = scattered(2, torch.float32, tasks=2, shapes=((4,),), absent=0.0)
    (place,) = out = places(problem.blocks)
    loss = (torch.ones(4, requires_grad=True) * place).sum()
    kernels.combine_blocks(problem.blocks, torch.ones(1, 2, dtype=torch.float64), None, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@cases.on_all_backends
def test_blocks_without_columns_have_a_gram_matrix_of_zeros(backend):
    problem = scattered(0, torch.float32, tasks=3, shapes=((0,), (2, 0)), absent=0.0)
    order, out = torch.arange(3).repeat(3, 1), places(problem.blocks)
    assert not kernels.gram_blocks(problem.blocks, [1, 0], 2).any()
    gram, weights, *_ = kernels.pcgrad_blocks(problem.blocks, order, Guards(), 1.0, out)()
    assert not gram.any() and weights.tolist() == [1.0] * 3


PIECE = 1 << 14
"""Columns of a block that the CPU library takes at a time, of a J of less than a million columns."""


def one_piece(blocks, b, first):
    """Some columns of a block, by themselves."""
    tensors = [[None if row[b] is None else row[b].flatten()[first : first + PIECE]] for row in blocks.tensors]
    pointers = [[0 if row is None else row.data_ptr() for row in task] for task in tensors]
    width = min(PIECE, blocks.widths[b] - first)
    return Blocks(tensors, pointers, array("q", [width]), blocks.dtype, blocks.device)


def added_in_order(blocks, owners, problems):
    """The matrices of single pieces, added one after the other."""
    tasks = len(blocks.tensors)
    grams = torch.zeros(problems, tasks, tasks, dtype=torch.float64)
    for b, owner in enumerate(owners):
        for first in range(0, blocks.widths[b], PIECE):
            if owner >= 0:
                grams[owner] += kernels.gram_blocks(one_piece(blocks, b, first), None, 1)[0]
    return grams


def many_pieces(tasks, dtype, scale=1.0):
    """More than have their partial sums at a time, and with 400 tasks another number of them for each thread."""
    widths = [3] * 30 if tasks == 400 else [3] * 70 + [PIECE + 500] + [2, 0, 5] * 25
    return scattered(tasks, dtype, tasks, [(width,) for width in widths], scale=scale)


@pytest.mark.parametrize(
    ("backend", "tasks", "dtype", "scale"),
    [
        *((name, 150, torch.float32, 1.0) for name in BACKENDS[1:]),
        *(("cpu", 150, dtype, 1.0) for dtype in cases.DTYPES[1:]),
        # Squares that leave fp32's range: all products are made again.
        ("cpu", 150, torch.float32, 1e-30),
        ("cpu", 150, torch.bfloat16, 1e25),
        ("cpu", 400, torch.float32, 1.0),
    ],
    indirect=["backend"],
    ids=str,
)
def test_partial_sums_are_added_in_the_order_of_the_pieces(backend, tasks, dtype, scale, with_threads):
    """To the bit, however many threads there are and however many pieces they make at a time."""
    problem, draw = many_pieces(tasks, dtype, scale), random.Random(tasks)
    owners = [draw.randrange(-1, 3) for _ in problem.blocks.widths]
    expected = added_in_order(problem.blocks, owners, 3)
    assert expected.isfinite().all() and expected[:, 0, 0].all()
    for threads in (1, 2, 3):
        found = with_threads(threads, lambda: kernels.gram_blocks(problem.blocks, owners, 3))
        assert torch.equal(found, expected), threads


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_surgery_of_many_pieces_adds_in_the_same_order(backend, with_threads):
    problem, order = many_pieces(150, torch.float32), torch.arange(150).repeat(150, 1)
    expected = added_in_order(problem.blocks, [0] * len(problem.blocks.widths), 1)[0]
    for threads in (1, 2, 3):
        out = [None if place is None else torch.empty_like(place) for place in places(problem.blocks)]
        found = with_threads(
            threads,
            lambda out=out: kernels.pcgrad_blocks(problem.blocks, order, Guards(), 1.0, out)(),
        )
        assert torch.equal(found.gram, expected), threads


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("block", [0, 20, 140])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_what_is_not_finite_in_one_of_many_pieces_stays_in_its_row_and_column(backend, block, bad):
    problem = scattered(4, torch.float32, 150, [(3,)] * 150, absent=0.0)
    problem.blocks.tensors[7][block][1] = bad
    gram = kernels.gram_blocks(problem.blocks, None, 1)[0]
    others = [t for t in range(150) if t != 7]
    assert not gram[7].isfinite().any() and gram[others][:, others].isfinite().all()


@pytest.mark.parametrize("backend", ["eager"], indirect=True)
@in_each_dtype
def test_blocks_are_packed_a_batch_at_a_time_and_those_of_more_columns_in_parts(backend, dtype, monkeypatch):
    packed, pack = [], stacked._pack

    def recorded(*arguments):
        packed.append(pack(*arguments).nbytes)
        return pack(*arguments)

    monkeypatch.setattr(stacked, "_BATCH_BYTES", 4000)
    monkeypatch.setattr(stacked, "_pack", recorded)
    for seed in range(3):
        problem, draw = scattered(seed, dtype, tasks=3), random.Random(seed)
        owners = [draw.randrange(2) for _ in SHAPES]
        grams = kernels.gram_blocks(problem.blocks, owners, 2)
        for number in range(2):
            inside = [problem.rows[:, problem.columns(b)] for b, owner in enumerate(owners) if owner == number]
            assert gram_error(grams[number], torch.cat(inside, dim=1)) <= cases.GRAM_TOLERANCE[dtype]
        weights, out = torch.randn(2, 3, dtype=torch.float64), places(problem.blocks)
        kernels.combine_blocks(problem.blocks, weights, owners, out)
        for b, merged in enumerate(out):
            if merged is not None:
                rows = problem.rows[:, problem.columns(b)]
                assert cases.error(merged.flatten(), rows, weights[owners[b]]) <= cases.ROW_TOLERANCE[dtype]
    assert 3000 < max(packed) <= 4000
