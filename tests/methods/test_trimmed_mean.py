"""TrimmedMean: TorchJD's numbers, robustness, hand-worked cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpcgrad import reference
from fastpcgrad.methods.trimmed_mean import TrimmedMean
from tests.methods.random_rows import HARD, KINDS, random_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_oracles(dtype, solver):
    def check(rows, trim_number):
        found, expected = TrimmedMean(trim_number).aggregate(rows), reference.trimmed_mean(rows, trim_number)
        assert ((found - expected).abs() <= 2 * torch.finfo(dtype).eps * rows.abs().sum(dim=0)).all()

    for seed in range(66):
        rows = random_rows(seed, max_tasks=10, kinds=KINDS + HARD).to(dtype)
        check(rows, seed % ((len(rows) + 1) // 2))
    for tasks in (17, 33):
        check(torch.randn(tasks, 100, dtype=dtype), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torchjd(dtype):
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(250):
        rows = random_rows(seed).to(dtype)
        trim_number = seed % ((len(rows) + 1) // 2)
        found = TrimmedMean(trim_number).aggregate(rows)
        expected = aggregation.TrimmedMean(trim_number)(rows)
        allowed = 2 * torch.finfo(dtype).eps * rows.abs().sum(dim=0)
        assert ((found - expected).abs() <= allowed).all(), seed


@given(seed=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_outliers_cannot_leave_the_range_of_the_others(seed):
    """As many arbitrary rows as are trimmed at either end: each column stays within the honest entries."""
    generator = torch.Generator().manual_seed(seed)
    honest = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    arbitrary = 1e20 * torch.randn(2, 30, generator=generator, dtype=torch.float64)
    found = TrimmedMean(2).aggregate(torch.cat([arbitrary, honest]))
    assert ((found >= honest.min(dim=0).values) & (found <= honest.max(dim=0).values)).all()


@given(seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_tasks_does_not_matter(seed):
    rows = random_rows(seed, min_tasks=3)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(TrimmedMean(1).aggregate(rows[order]), TrimmedMean(1).aggregate(rows))


def test_by_hand():
    rows = torch.tensor([[1.0, 4.0], [2.0, 4.0], [3.0, -9.0], [10.0, 4.0]])
    assert TrimmedMean(1).aggregate(rows).tolist() == [2.5, 4.0]
    assert TrimmedMean(0).aggregate(rows).tolist() == [4.0, 0.75]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    rows = torch.randn(5, 300).to(dtype)
    found = TrimmedMean(1).aggregate(rows)
    assert found.dtype == dtype and torch.equal(found, TrimmedMean(1).aggregate(rows.float()).to(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_the_result_at_its_place(value):
    rows = torch.randn(5, 50)
    rows[1, 7] = value
    assert TrimmedMean(2).aggregate(rows).isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_it_scales(scale):
    rows = torch.randn(4, 200, dtype=torch.float64)
    torch.testing.assert_close(TrimmedMean(1).aggregate(rows * scale) / scale, TrimmedMean(1).aggregate(rows))


def test_the_rows_stay_as_they_are_and_may_be_strided():
    rows = torch.randn(3, 60)
    before, strided = rows.clone(), rows[:, ::2]
    assert torch.equal(TrimmedMean(1).aggregate(strided), TrimmedMean(1).aggregate(strided.contiguous()))
    assert torch.equal(rows, before)
    assert TrimmedMean(1).aggregate(rows[:, :0]).shape == (0,)


@pytest.mark.parametrize(
    ("value", "error", "words"), [(-1, ValueError, "at least 0; found -1"), (1.0, TypeError, "1.0")]
)
def test_bad_arguments(value, error, words):
    with pytest.raises(error, match=f"trim_number must be .*{words}"):
        TrimmedMean(value)


def test_too_few_tasks():
    with pytest.raises(ValueError, match=r"at least 5 .* found 4"):
        TrimmedMean(2).aggregate(torch.ones(4, 3))


def test_it_has_no_weights():
    with pytest.raises(TypeError, match="TrimmedMean needs the task gradients"):
        TrimmedMean(0).weights(torch.eye(2, dtype=torch.float64))


def test_repr():
    assert repr(TrimmedMean(2)) == "TrimmedMean(trim_number=2)"
