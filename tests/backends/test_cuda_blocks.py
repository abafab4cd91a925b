"""The CUDA backend on task gradients in blocks, against the oracle: on a GPU where there is one, else emulated."""

from __future__ import annotations

import random
from array import array
from itertools import accumulate

import pytest
import torch

from fastpcgrad import reference
from fastpcgrad._blocks import Blocks
from fastpcgrad.backends import cuda
from fastpcgrad.variants import Guards
from tests.backends.cuda_emulated import CXX, DEVICE, GPU
from tests.ops import cases

pytestmark = [
    pytest.mark.skipif(not (GPU or CXX), reason="needs a GPU with the CUDA library, or a C++ compiler"),
    pytest.mark.usefixtures("poisoned_memory", "library"),
]
in_each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)

WIDTHS = (5, 1, 0, 1300, 64, 4096, 129, 3, 9001)
"""Below, at and beyond a step of the kernels; one that is empty."""
GUARD = 16


class Scattered:
    """T rows in blocks, each in memory of its own with NaN around it, some of them absent; and the same as one J.

    ``shift``: elements between a multiple of 16 bytes and where each row begins.
    """

    def __init__(self, tasks, dtype, widths=WIDTHS, *, seed=0, absent=0.3, shift=0, scale=1.0):
        draw, values = random.Random(seed), torch.Generator().manual_seed(seed)
        self.offsets = [0, *accumulate(widths)]
        rows, self.storages, tensors = [], [], []
        for _ in range(tasks):
            row, places = [], []
            for width in widths:
                part = (torch.randn(width, generator=values) * scale).to(dtype)
                there = draw.random() >= absent
                row.append(part * there)
                places.append(self._place(part, shift) if there else None)
            rows.append(torch.cat([torch.empty(0, dtype=dtype), *row]))
            tensors.append(places)
        self.rows = torch.stack(rows)
        self.blocks = blocks_of(tensors, widths, dtype)

    def _place(self, part, shift):
        storage = torch.full((GUARD + shift + len(part) + GUARD,), torch.nan, dtype=part.dtype, device=DEVICE)
        first = GUARD + shift
        storage[first : first + len(part)] = part.to(DEVICE)
        self.storages.append((storage, first, len(part)))
        return storage[first : first + len(part)]

    def nothing_around_is_touched(self):
        return all(s[:first].isnan().all() and s[first + width :].isnan().all() for s, first, width in self.storages)

    def columns(self, b):
        return self.rows[:, self.offsets[b] : self.offsets[b + 1]]

    def firsts(self):
        """For each block its first row that is there."""
        columns = zip(*self.blocks.tensors, strict=True)
        return [next((row for row in column if row is not None), None) for column in columns]

    def fresh(self):
        return [None if p is None else torch.full_like(p, torch.nan) for p in self.firsts()]


def blocks_of(tensors, widths, dtype):
    pointers = [[0 if row is None else row.data_ptr() for row in task] for task in tensors]
    return Blocks(tensors, pointers, array("q", widths), dtype, torch.device(DEVICE))


def on_device(tensor):
    return tensor.to(DEVICE)


def random_order(tasks):
    return on_device(torch.rand(tasks, tasks).argsort(dim=1))


def gram_error(found, rows):
    """The largest |G − G₆₄|_ij / (‖g_i‖ ‖g_j‖)."""
    exact = reference.gram(rows)
    norms = exact.diagonal().sqrt()
    distance = (found.cpu() - exact).abs()
    return float(torch.where(distance == 0, 0.0, distance / (norms[:, None] * norms)).max())


def assert_merged(problem, out, weights, chosen=None):
    """Each block of ``out`` is the oracle's product with its row of ``weights``."""
    for b, merged in enumerate(out):
        if merged is not None:
            of_block = weights if chosen is None else weights[chosen[b]]
            error = cases.error(merged.cpu(), problem.columns(b), of_block)
            assert error <= cases.ROW_TOLERANCE[merged.dtype], b


TASKS = (1, 2, 3, 8, 9, 33)


@in_each_dtype
@pytest.mark.parametrize("tasks", TASKS)
def test_gram_is_the_oracles(tasks, dtype):
    for shift in (0, 1):
        problem = Scattered(tasks, dtype, seed=tasks, shift=shift)
        found = cuda.gram_blocks(problem.blocks, None, 1)
        assert found.shape == (1, tasks, tasks) and torch.equal(found[0], found[0].mT)
        assert gram_error(found[0], problem.rows) <= cases.GRAM_TOLERANCE[dtype]


@pytest.mark.parametrize("tasks", [3, 11])
def test_blocks_count_for_their_problem_only(tasks):
    for seed in range(4):
        problem, draw = Scattered(tasks, torch.float64, seed=seed), random.Random(seed)
        owners = [draw.randrange(-1, 4) for _ in WIDTHS]
        found = cuda.gram_blocks(problem.blocks, owners, 5)
        for number in range(5):
            inside = [problem.columns(b) for b, owner in enumerate(owners) if owner == number]
            assert gram_error(found[number], torch.cat([problem.rows[:, :0], *inside], dim=1)) <= 1e-13


@in_each_dtype
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("in_place", [False, True])
def test_combine_takes_each_blocks_own_weights(tasks, dtype, in_place):
    problem, draw = Scattered(tasks, dtype, seed=tasks, shift=tasks % 2), random.Random(tasks)
    weights = torch.randn(3, tasks, dtype=torch.float64)
    chosen = [draw.randrange(3) for _ in WIDTHS]
    out = problem.firsts() if in_place else problem.fresh()
    cuda.combine_blocks(problem.blocks, on_device(weights), chosen, out)
    assert_merged(problem, out, weights, chosen)
    assert problem.nothing_around_is_touched()


def test_what_is_combined_in_place_leaves_the_other_rows():
    problem = Scattered(3, torch.float32, absent=0.0)
    before = [[row.clone() for row in task] for task in problem.blocks.tensors]
    cuda.combine_blocks(problem.blocks, on_device(torch.ones(1, 3, dtype=torch.float64)), None, problem.firsts())
    for task, kept in list(zip(problem.blocks.tensors, before, strict=True))[1:]:
        assert all(torch.equal(row, old) for row, old in zip(task, kept, strict=True))


@in_each_dtype
@pytest.mark.parametrize("tasks", [2, 5, 8, 17])
def test_the_whole_surgery_is_gram_solve_and_combine(tasks, dtype):
    problem, order = Scattered(tasks, dtype, seed=tasks), random_order(tasks)
    out = problem.firsts()
    gram, weights, coefficients, _ = cuda.pcgrad_blocks(problem.blocks, order, Guards(self_projection=True), 0.5, out)()
    assert gram_error(gram, problem.rows) <= cases.GRAM_TOLERANCE[dtype]
    exact = reference.coefficients(reference.gram(problem.rows), order.cpu(), True, 0.0, 0.0)
    torch.testing.assert_close(coefficients.cpu(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, 0.5 * coefficients.sum(dim=0))
    assert_merged(problem, out, weights.cpu())
    assert problem.nothing_around_is_touched()


@in_each_dtype
@pytest.mark.parametrize("tasks", [3, 8, 12])
def test_whole_steps_and_single_columns_give_the_same_bits(tasks, dtype):
    """The same rows, once where 16 bytes at a time are read and once where that is impossible."""
    results = []
    for shift in (0, 1):
        problem = Scattered(tasks, dtype, shift=shift)
        out = problem.fresh()
        weights = on_device(torch.randn(1, tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
        cuda.combine_blocks(problem.blocks, weights, None, out)
        results.append(out)
    for aligned, shifted in zip(*results, strict=True):
        assert aligned is shifted is None or torch.equal(aligned, shifted)


@pytest.mark.parametrize("tasks", [4, 12])
def test_one_unaligned_row_is_enough_for_its_block_alone(tasks):
    problem = Scattered(tasks, torch.float32, absent=0.0)
    tensors = [list(task) for task in problem.blocks.tensors]
    tensors[2][5] = problem._place(tensors[2][5].cpu(), shift=3)
    blocks = blocks_of(tensors, WIDTHS, torch.float32)
    assert gram_error(cuda.gram_blocks(blocks, None, 1)[0], problem.rows) <= 1e-6
    out = problem.fresh()
    out[3] = torch.full((WIDTHS[3] + 1,), torch.nan, device=DEVICE)[1:]
    weights = torch.randn(1, tasks, dtype=torch.float64)
    cuda.combine_blocks(blocks, on_device(weights), None, out)
    assert_merged(problem, out, weights[0])


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e18])
@pytest.mark.parametrize("tasks", [3, 12])
def test_gram_holds_what_fp32_squares_do_not(tasks, scale):
    problem = Scattered(tasks, torch.float32, scale=scale)
    assert gram_error(cuda.gram_blocks(problem.blocks, None, 1)[0], problem.rows) <= 1e-6


@pytest.mark.parametrize("scale", cases.SUBNORMAL_SQUARES)
@pytest.mark.parametrize("tasks", [3, 12])
def test_gram_holds_what_fp32_squares_hold_but_in_part(tasks, scale):
    widths = (1300, 700)
    rows = cases.rows_of_one_size(tasks, sum(widths), scale)
    rows[1] /= scale
    tensors = [list(row.to(DEVICE).split(widths)) for row in rows]
    assert gram_error(cuda.gram_blocks(blocks_of(tensors, widths, torch.float32), None, 1)[0], rows) <= 1e-6


def test_one_problem_out_of_range_does_not_spoil_another():
    scales = {0: 1.0, 1: 1e-30, 2: 1.0}
    parts = {n: Scattered(3, torch.float32, (2000, 300), seed=n, scale=scale) for n, scale in scales.items()}
    owners = (0, 2, 1, 0, 1)
    tensors = [[] for _ in range(3)]
    for b, owner in enumerate(owners):
        for task, row in zip(parts[owner].blocks.tensors, tensors, strict=True):
            row.append(task[b > 2])
    found = cuda.gram_blocks(blocks_of(tensors, (2000, 2000, 2000, 300, 300), torch.float32), owners, 3)
    assert gram_error(found[1], parts[1].rows) <= 1e-6
    assert torch.equal(found[0], cuda.gram_blocks(parts[0].blocks, None, 1)[0])
    assert gram_error(found[2], parts[2].columns(0)) <= 1e-6


@pytest.mark.parametrize("tasks", [3, 11])
@pytest.mark.parametrize(("bad", "broken", "absent"), [(torch.nan, 0, 1), (torch.inf, 0, 1), (torch.inf, 1, 0)])
def test_an_absent_row_takes_part_in_nothing(tasks, bad, broken, absent):
    """Neither with a row that is not finite, nor with a weight that is not."""
    problem = Scattered(tasks, torch.float32, (40, 3000), absent=0.0)
    tensors = [list(task) for task in problem.blocks.tensors]
    tensors[broken][1][7] = bad
    tensors[absent][1] = None
    blocks = blocks_of(tensors, (40, 3000), torch.float32)
    gram = cuda.gram_blocks(blocks, None, 1)[0]
    others = list(range(2, tasks))
    assert gram[absent].isfinite().all() and gram[others][:, others].isfinite().all()
    assert not gram[broken, [broken, *others]].isfinite().any()

    weights = torch.ones(1, tasks, dtype=torch.float64)
    weights[0, absent] = torch.nan
    out = problem.fresh()
    cuda.combine_blocks(blocks, on_device(weights), None, out)
    assert out[0].isnan().all() and (~out[1].isfinite()).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(("size", "scale"), [(1e-42, 1e36), (1e34, 1e-34)])
def test_weights_that_fp32_cannot_hold(size, scale):
    problem = Scattered(3, torch.float32, absent=0.0, scale=scale)
    weights, out = size * torch.randn(1, 3, dtype=torch.float64), problem.fresh()
    cuda.combine_blocks(problem.blocks, on_device(weights), None, out)
    assert_merged(problem, out, weights[0])


@pytest.mark.parametrize("widths", [(), (0,), (0, 0, 4)])
def test_nothing_to_merge(widths):
    problem = Scattered(3, torch.float32, widths, absent=1.0)
    out = [None] * len(widths)
    gram, weights, coefficients, _ = cuda.pcgrad_blocks(problem.blocks, random_order(3), Guards(), 1.0, out)()
    assert not gram.any() and torch.equal(coefficients.cpu(), torch.eye(3, dtype=torch.float64))
    assert weights.tolist() == [1.0] * 3
    assert cuda.gram_blocks(problem.blocks, None, 0).shape == (0, 3, 3)


@pytest.mark.parametrize("tasks", [3, 9])
def test_many_tiny_blocks(tasks):
    """More numbers in the tables than the parameters of one launch hold."""
    widths = [1 + b % 5 for b in range(150)]
    problem = Scattered(tasks, torch.float32, widths)
    assert gram_error(cuda.gram_blocks(problem.blocks, None, 1)[0], problem.rows) <= 1e-6
    weights, out = torch.randn(150, tasks, dtype=torch.float64), problem.firsts()
    cuda.combine_blocks(problem.blocks, on_device(weights), range(150), out)
    assert_merged(problem, out, weights, range(150))


@pytest.mark.parametrize("tasks", [5, 12])
def test_one_long_block_among_short_ones(tasks):
    """Its items hold several steps."""
    widths = (7, 60_003, 1, 1025)
    problem, order = Scattered(tasks, torch.bfloat16, widths, absent=0.0), random_order(tasks)
    out = problem.firsts()
    gram, weights, *_ = cuda.pcgrad_blocks(problem.blocks, order, Guards(), 1.0, out)()
    assert gram_error(gram, problem.rows) <= 1e-6
    assert_merged(problem, out, weights.cpu())


@pytest.mark.parametrize("tasks", [4, 12])
def test_bits_do_not_depend_on_the_multiprocessors(library, tasks):
    if library is None:
        pytest.skip("a GPU has as many multiprocessors as it has")
    order, results = random_order(tasks), []
    for multiprocessors in (1, 2, 5):
        library.emulated_multiprocessors(multiprocessors)
        problem = Scattered(tasks, torch.float32)
        out = problem.firsts()
        results.append([*cuda.pcgrad_blocks(problem.blocks, order, Guards(), 1.0, out)()[:3], *out])
    for other in results[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@in_each_dtype
@pytest.mark.parametrize("tasks", [4, 12])
def test_one_block_gives_the_bits_of_packed_rows(tasks, dtype):
    """If all rows begin at a multiple of 16 bytes in both, and the width is one of whole steps."""
    width = 12_288
    problem, order = Scattered(tasks, dtype, (width,), absent=0.0), random_order(tasks)
    packed, merged = on_device(problem.rows), torch.empty(width, dtype=dtype, device=DEVICE)
    gram, coefficients, weights = cuda.pcgrad(packed, order, Guards(), 1.0, None, merged)
    (out,) = outs = problem.fresh()
    found = cuda.pcgrad_blocks(problem.blocks, order, Guards(), 1.0, outs)()
    assert torch.equal(found.gram, gram) and torch.equal(found.weights, weights)
    assert found.coefficients is not None and torch.equal(found.coefficients, coefficients)
    assert torch.equal(out, merged)


def test_the_workspace_that_is_asked_for_is_enough(library, monkeypatch):
    """Fewer blocks can need more partial sums: slots are rounded. Nothing behind the workspace is written."""
    if library is None:
        pytest.skip("the memory checker looks for this on a GPU")
    taken = []

    def guarded(nbytes, device):
        taken.append(torch.full((nbytes + 64,), 0xA5, dtype=torch.uint8, device=device))
        return taken[-1][:nbytes]

    monkeypatch.setattr(cuda, "_workspace", guarded)
    for steps in range(5, 16):
        for extra in (0, 1, 3):
            problem = Scattered(3, torch.float32, (2048 * steps, *[1] * extra), absent=0.0)
            owners = [0, *[-1, 1, 2][:extra]]
            cuda.gram_blocks(problem.blocks, owners, 3)
            cuda.combine_blocks(
                problem.blocks, torch.ones(3, 3, dtype=torch.float64), [0] * (1 + extra), problem.firsts()
            )
    assert all(bool((memory[-64:] == 0xA5).all()) for memory in taken)


@pytest.fixture
def in_groups(monkeypatch):
    """Blocks come in groups of two; gives the bytes of each workspace that is taken."""
    taken, take = [], cuda._workspace

    def counted(nbytes, device):
        taken.append(nbytes)
        return take(nbytes, device)

    monkeypatch.setattr(cuda, "_blocks_of_group", lambda tasks: 2)
    monkeypatch.setattr(cuda, "_workspace", counted)
    return taken


@in_each_dtype
@pytest.mark.parametrize("tasks", [3, 11])
def test_blocks_in_groups_count_for_their_problem_only(in_groups, tasks, dtype):
    for seed in range(3):
        problem, draw = Scattered(tasks, dtype, seed=seed), random.Random(seed)
        owners = [draw.randrange(-1, 4) for _ in WIDTHS]
        owners[4:6] = [-1, -1]  # a group of no problem
        found = cuda.gram_blocks(problem.blocks, owners, 5)
        for number in range(5):
            inside = [problem.columns(b) for b, owner in enumerate(owners) if owner == number]
            exact = torch.cat([problem.rows[:, :0], *inside], dim=1)
            assert gram_error(found[number], exact) <= cases.GRAM_TOLERANCE[dtype]
    assert 0 < max(in_groups) <= cuda.workspace_nbytes(tasks, WIDTHS, dtype, 5)


@in_each_dtype
@pytest.mark.parametrize("tasks", [3, 11])
def test_the_whole_surgery_of_blocks_in_groups(in_groups, tasks, dtype):
    problem, order = Scattered(tasks, dtype, seed=tasks), random_order(tasks)
    out = problem.firsts()
    gram, weights, coefficients, _ = cuda.pcgrad_blocks(problem.blocks, order, Guards(self_projection=True), 0.5, out)()
    assert gram_error(gram, problem.rows) <= cases.GRAM_TOLERANCE[dtype]
    exact = reference.coefficients(reference.gram(problem.rows), order.cpu(), True, 0.0, 0.0)
    torch.testing.assert_close(coefficients.cpu(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, 0.5 * coefficients.sum(dim=0))
    assert_merged(problem, out, weights.cpu())
    assert problem.nothing_around_is_touched()
    assert len(in_groups) > 1 and max(in_groups) <= cuda.workspace_nbytes(tasks, WIDTHS, dtype, 1)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e18])
def test_groups_hold_what_fp32_squares_do_not(in_groups, scale):
    problem = Scattered(3, torch.float32, scale=scale)
    assert gram_error(cuda.gram_blocks(problem.blocks, None, 1)[0], problem.rows) <= 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_in_one_group_is_seen(in_groups, bad):
    problem = Scattered(3, torch.float32, absent=0.0)
    problem.blocks.tensors[1][6][100] = bad
    gram = cuda.gram_blocks(problem.blocks, None, 1)[0]
    assert not gram[1].isfinite().any() and gram[[0, 2]][:, [0, 2]].isfinite().all()


def test_the_workspace_does_not_grow_with_the_blocks_but_for_their_tables():
    """With 200 tasks the partial sums of a block take 157 KiB, the addresses of its rows 2."""
    nbytes = [cuda.workspace_nbytes(200, [16] * blocks, torch.float32, 1) for blocks in (300, 1500, 15_000)]
    assert nbytes[0] < nbytes[1] == nbytes[2] < 100 << 20
    tables = 8 * (200 + 4) * 150_000
    assert tables < cuda.workspace_nbytes(200, [16] * 150_000, torch.float32, 1) < tables + 1024


@pytest.mark.parametrize("tasks", [8, 30, 64, 250])
def test_a_device_with_less_shared_memory(library, tasks):
    if library is None:
        pytest.skip("a GPU has the shared memory that it has")
    library.emulated_shared_memory(99)
    problem = Scattered(tasks, torch.float32, (300, 7, 65))
    assert gram_error(cuda.gram_blocks(problem.blocks, None, 1)[0], problem.rows) <= 1e-6
    out, weights = problem.fresh(), torch.randn(1, tasks, dtype=torch.float64)
    cuda.combine_blocks(problem.blocks, on_device(weights), None, out)
    assert_merged(problem, out, weights[0])


def test_an_error_of_a_launch_is_an_exception_with_its_text(library, monkeypatch):
    if library is None:
        pytest.skip("the emulated stream that fails is not a GPU's")
    monkeypatch.setattr(cuda, "_stream", lambda device: 2**64 - 1)
    with pytest.raises(RuntimeError, match="fpg_cuda_gram_blocks: invalid resource handle"):
        cuda.gram_blocks(Scattered(2, torch.float32, (10,)).blocks, None, 1)
