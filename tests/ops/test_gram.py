"""gram: G = J Jᵀ."""

import pytest
import torch

import fastpcgrad
from fastpcgrad import reference
from tests.ops import cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_is_gram(found, rows, segments):
    exact = reference.gram(rows, segments)
    norms = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    bound = cases.GRAM_TOLERANCE[rows.dtype] * norms[..., :, None] * norms[..., None, :]
    assert found.dtype == torch.float64 and found.shape == exact.shape
    assert bool(((found - exact).abs() <= bound).all())


@cases.on_each_backend_by_tasks(cases.ALL, triton=cases.TINY)
def test_is_the_oracles_within_tolerance(backend, group):
    for case in group:
        packed = cases.Packed(case)
        assert_is_gram(fastpcgrad.gram(packed.grads, case.segments), packed.rows, case.segments)


@cases.on_each_backend(cases.SOME)
def test_leaves_the_rows_alone(backend, case):
    packed = cases.Packed(case)
    fastpcgrad.gram(packed.grads, case.segments)
    assert packed.is_untouched()


def test_is_exact_for_small_integers(backend):
    rows = torch.randint(-8, 9, (8, 5000)).float()
    assert torch.equal(fastpcgrad.gram(rows), reference.gram(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reads_half_precision_numbers_of_each_size(backend, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite() & (every.abs() < 1e18)][::17]
    ones = torch.ones_like(finite)
    # One column a segment: each entry is one number times one.
    found = fastpcgrad.gram(torch.stack([finite, ones]), range(len(finite) + 1))
    assert torch.equal(found[:, 0, 1], finite.double())


def test_segments_given_as_a_list_or_a_tensor_are_the_same(backend):
    rows, segments = torch.randn(3, 100), [0, 30, 30, 100]
    assert torch.equal(fastpcgrad.gram(rows, segments), fastpcgrad.gram(rows, torch.tensor(segments)))


def test_segments_may_be_a_strided_tensor(backend):
    rows = torch.randn(3, 100)
    strided = torch.tensor([0, -1, 30, -1, 100, -1])[::2]
    assert torch.equal(fastpcgrad.gram(rows, strided), fastpcgrad.gram(rows, [0, 30, 100]))


def test_segments_add_up_to_the_whole(backend):
    rows = torch.randint(-8, 9, (5, 1000)).float()
    assert torch.equal(fastpcgrad.gram(rows, [0, 0, 7, 640, 1000]).sum(dim=0), fastpcgrad.gram(rows))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_own_row_and_column(backend, bad):
    rows = torch.randn(5, 1000)
    expected = reference.gram(rows)
    rows[2, 999] = bad
    found = fastpcgrad.gram(rows)
    others = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(found[others][:, others], expected[others][:, others], rtol=0, atol=1e-3)
    assert not found[2].isfinite().any() and not found[:, 2].isfinite().any()


def test_a_value_that_is_not_finite_stays_in_its_own_segment(backend):
    rows = torch.randn(3, 200)
    rows[1, 150] = torch.nan
    found = fastpcgrad.gram(rows, [0, 100, 200])
    assert_is_gram(found[0], rows[:, :100], None)
    assert found[1, 1].isnan().all()


def test_one_row_out_of_range_does_not_spoil_the_others(backend):
    rows = torch.randn(6, 3000)
    scales = torch.tensor([1e-38, 1e-25, 1e-12, 1.0, 1e15, 1e30])
    rows *= scales[:, None]
    assert_is_gram(fastpcgrad.gram(rows), rows, None)


def test_squares_of_subnormal_numbers_are_kept(backend):
    rows = torch.full((2, 300), 1e-44)
    rows[1] = 3.0
    assert_is_gram(fastpcgrad.gram(rows), rows, None)


@pytest.mark.parametrize("scale", cases.SUBNORMAL_SQUARES)
@cases.on_all_backends
def test_squares_that_fp32_holds_but_in_part(backend, scale):
    rows = cases.rows_of_one_size(3, 2000, scale)
    assert_is_gram(fastpcgrad.gram(rows), rows, None)
    # Beside rows of ordinary size, and in the second of two segments.
    rows[1] /= scale
    assert_is_gram(fastpcgrad.gram(rows), rows, None)
    rows[:, :700] = torch.randn(3, 700)
    assert_is_gram(fastpcgrad.gram(rows, [0, 700, 2000]), rows, [0, 700, 2000])


@pytest.mark.parametrize("segments", [None, [0, 10, 10, 150_000, 300_007]], ids=["whole", "segments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_threads(backend, with_threads, dtype, segments):
    rows = torch.randn(9, 300_007).to(dtype)
    one, two, again = (with_threads(n, lambda: fastpcgrad.gram(rows, segments)) for n in (1, 2, 2))
    assert torch.equal(one, two) and torch.equal(two, again)


@pytest.mark.parametrize("tasks", [2, 33])
def test_bits_do_not_depend_on_the_threads_where_chunks_grow_with_the_columns(backend, with_threads, tasks):
    """From 2²² columns on, and from 2²⁰ for more than 32 tasks; fp64 rows, whose sums are rounded in every step."""
    width = 4_300_003 if tasks <= 32 else 1_100_003
    rows = torch.rand(1, width, dtype=torch.float64).expand(tasks, -1)
    one, *others = (with_threads(n, lambda: fastpcgrad.gram(rows)) for n in (1, 2, 3))
    assert all(torch.equal(one, other) for other in others)
