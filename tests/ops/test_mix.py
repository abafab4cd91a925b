"""mix_: J ← C J in place."""

import pytest
import torch

import fastpcgrad
from tests.ops import cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@cases.on_each_backend_by_tasks(cases.ALL, triton=cases.TINY)
def test_is_the_oracles_within_tolerance(backend, group):
    for case in group:
        packed, matrix = cases.Packed(case), cases.matrix_of(case)
        assert fastpcgrad.mix_(packed.grads, matrix, segments=case.segments) is packed.grads
        assert cases.error(packed.grads, packed.rows, matrix, case.segments) <= cases.ROW_TOLERANCE[case.dtype]
        assert packed.padding_is_untouched(), case


@cases.on_each_backend_by_tasks([case for case in cases.ALL if case.tasks in (1, 17) and case.width < 100_000])
def test_the_identity_changes_nothing(backend, group):
    for case in group:
        packed = cases.Packed(case)
        identity = torch.eye(case.tasks, dtype=torch.float64).expand(*case.per_segment, -1, -1)
        fastpcgrad.mix_(packed.grads, identity, segments=case.segments)
        assert packed.is_untouched(), case


@cases.on_each_backend(cases.SOME)
def test_a_permutation_permutes_the_rows(backend, case):
    packed = cases.Packed(case)
    shift = torch.eye(case.tasks, dtype=torch.float64).roll(1, dims=0).expand(*case.per_segment, -1, -1)
    fastpcgrad.mix_(packed.grads, shift, segments=case.segments)
    assert torch.equal(packed.grads, packed.rows.roll(1, dims=0))


@cases.on_each_backend(cases.SOME)
def test_each_row_is_what_combine_gives(backend, case):
    packed, matrix = cases.Packed(case), cases.matrix_of(case)
    fastpcgrad.mix_(packed.grads, matrix, segments=case.segments)
    for row, weights in zip(packed.grads, matrix.unbind(dim=-2), strict=True):
        combined = fastpcgrad.combine(packed.rows, weights, segments=case.segments)
        torch.testing.assert_close(row, combined, rtol=8e-3, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("tasks", [2, 9])
def test_a_zero_coefficient_does_not_hide_a_value_that_is_not_finite(backend, tasks, dtype, bad):
    rows, matrix = torch.randn(tasks, 300).to(dtype), torch.ones(tasks, tasks, dtype=torch.float64)
    matrix[:, 1] = 0
    places = [0, 130, 299]
    clean = rows.clone()
    rows[1, places] = bad
    fastpcgrad.mix_(rows, matrix)
    assert rows[:, places].isnan().all()
    clean[:, places] = rows[:, places] = 0
    assert cases.error(rows, clean, matrix) <= cases.ROW_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("coefficient", "scale"), [(1e-45, 1e30), (1e45, 1e-38)])
def test_coefficients_that_fp32_cannot_hold(backend, dtype, coefficient, scale):
    rows = (torch.randn(3, 100) * scale).to(dtype)
    before, matrix = rows.clone(), coefficient * torch.randn(3, 3, dtype=torch.float64)
    fastpcgrad.mix_(rows, matrix)
    assert rows.isfinite().all() and rows.count_nonzero() > 0
    assert cases.error(rows, before, matrix) <= 2 * cases.ROW_TOLERANCE[dtype]


def test_coefficients_may_be_strided(backend):
    rows, matrix = torch.randn(4, 50), torch.randn(4, 4, dtype=torch.float64)
    assert torch.equal(fastpcgrad.mix_(rows.clone(), matrix.mT), fastpcgrad.mix_(rows, matrix.mT.contiguous()))


def test_each_segment_has_coefficients_of_its_own(backend):
    rows = torch.arange(12.0).reshape(2, 6)
    swap = torch.eye(2, dtype=torch.float64).flip(0)
    matrices = torch.stack([swap, 9 * swap, 2 * torch.eye(2, dtype=torch.float64)])
    fastpcgrad.mix_(rows, matrices, segments=[0, 2, 2, 6])
    assert rows.tolist() == [[6, 7, 4, 6, 8, 10], [0, 1, 16, 18, 20, 22]]


@pytest.mark.parametrize("segments", [None, [0, 10, 10, 150_000, 300_007]], ids=["whole", "segments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_threads(backend, with_threads, dtype, segments):
    rows = torch.randn(5, 300_007).to(dtype)
    matrix = torch.randn(*(() if segments is None else (4,)), 5, 5, dtype=torch.float64)
    call = lambda: fastpcgrad.mix_(rows.clone(), matrix, segments=segments)  # noqa: E731
    one, two, again = (with_threads(n, call) for n in (1, 2, 2))
    assert torch.equal(one, two) and torch.equal(two, again)
