"""trimmed_mean: the mean of each column without its extreme entries, on every backend."""

import pytest
import torch

from fastpcgrad.backends import cpu, eager, kernels
from tests.ops import cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTHS = (0, 1, 7, 16, 63, 64, 300, 70_001)


def trimmed_mean(rows, trim):
    out = torch.empty_like(next(row for row in rows if row is not None))
    kernels.trimmed_mean(rows, trim, out)
    return out


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("tasks", "trim"), [(1, 0), (2, 0), (3, 1), (8, 2), (9, 4), (33, 5)])
def test_against_a_sort(backend, dtype, tasks, trim):
    for width in WIDTHS:
        rows = torch.randn(tasks, width).to(dtype)
        wide = rows.to(torch.promote_types(dtype, torch.float32))
        kept = wide.sort(dim=0).values[trim : tasks - trim].double()
        found = trimmed_mean(list(rows), trim)
        assert found.dtype == dtype
        allowed = 2 * torch.finfo(wide.dtype).eps * kept.abs().sum(dim=0)
        rounding = torch.finfo(dtype).eps * kept.mean(dim=0).abs() if dtype != wide.dtype else 0
        assert ((found.double() - kept.mean(dim=0)).abs() <= allowed + rounding).all(), width


def test_absent_rows_are_zeros(backend):
    rows = [None, torch.tensor([1.0, -2.0, 5.0]), torch.tensor([9.0, -4.0, -1.0]), None]
    assert trimmed_mean(rows, 1).tolist() == [0.5, -1.0, 0.0]
    out = torch.ones(3)
    kernels.trimmed_mean([None] * 3, 1, out)
    assert out.tolist() == [0.0, 0.0, 0.0]


def test_the_result_may_take_the_place_of_a_row(backend):
    rows = torch.randn(5, 1000)
    wanted = trimmed_mean(list(rows), 2)
    kernels.trimmed_mean(list(rows), 2, rows[3])
    assert torch.equal(rows[3], wanted)


def test_rows_with_gaps_between_their_elements(backend):
    rows = torch.randn(5, 200)
    assert torch.equal(trimmed_mean(list(rows[:, ::2]), 1), trimmed_mean(list(rows[:, ::2].contiguous()), 1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_column_nan(backend, value):
    for tasks, trim in ((3, 1), (9, 3), (2, 0)):
        rows = torch.randn(tasks, 100)
        rows[1, 70] = value
        assert (~trimmed_mean(list(rows), trim).isfinite()).nonzero().tolist() == [[70]]


def test_the_number_of_threads_changes_no_bit(backend, with_threads):
    rows = list(torch.randn(5, 100_003))
    assert torch.equal(with_threads(1, lambda: trimmed_mean(rows, 1)), with_threads(2, lambda: trimmed_mean(rows, 1)))


def test_chunks_of_columns_give_the_whole(monkeypatch):
    rows, whole, chunked = torch.randn(3, 1000), torch.empty(1000), torch.empty(1000)
    eager.trimmed_mean(list(rows), 1, whole)
    monkeypatch.setattr(eager, "_ENTRIES", {"cpu": 1, "cuda": 1})
    eager.trimmed_mean(list(rows), 1, chunked)
    assert torch.equal(chunked, whole)


def test_the_library_refuses_places_that_are_none(monkeypatch):
    """A wrong network would write outside of the scratch memory."""
    if reason := cpu.why_unavailable("cpu"):
        pytest.skip(reason)
    from array import array

    rows, out = list(torch.randn(3, 10)), torch.zeros(10)
    for network in ([0, 1, 1, 3], [0, -1, 1, 2]):
        monkeypatch.setattr(cpu, "_network", lambda size, network=network: array("i", network))
        with pytest.raises(ValueError, match="fpg_cpu_trimmed_mean"):
            cpu.trimmed_mean(rows, 1, out)
    assert (out == 0).all()
