"""sign_sums: the sums of the positive and of the negative entries of each column, on every backend."""

import pytest
import torch

from fastpcgrad.backends import kernels
from tests.ops import cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTHS = (0, 1, 7, 16, 127, 128, 300, 70_001)


def sign_sums(rows, weights=None):
    there = next(row for row in rows if row is not None)
    sums = torch.empty(2, len(there), dtype=torch.promote_types(there.dtype, torch.float32))
    kernels.sign_sums(rows, weights, sums)
    return sums


def expected(rows, weights=None):
    wide = torch.stack([torch.zeros_like(next(r for r in rows if r is not None)) if r is None else r for r in rows])
    wide = wide.double()
    scale = torch.ones(len(rows)) if weights is None else torch.tensor(weights)
    return torch.stack([(scale.double()[:, None] * part).sum(dim=0) for part in (wide.clamp_min(0), wide.clamp_max(0))])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 5, 33])
def test_against_float64(backend, dtype, tasks):
    for width in WIDTHS:
        rows = list(torch.randn(tasks, width).to(dtype))
        weights = torch.randn(tasks).tolist()
        for given in (None, weights):
            found, wanted = sign_sums(rows, given), expected(rows, given)
            eps = torch.finfo(found.dtype).eps
            allowed = tasks * eps * expected([row.abs() for row in rows], None if given is None else [1e1] * tasks)[0]
            assert ((found - wanted).abs() <= allowed).all(), (width, given)


def test_absent_rows_are_zeros(backend):
    rows = [None, torch.tensor([1.0, -2.0, 0.0]), None, torch.tensor([-3.0, -4.0, -0.0])]
    assert sign_sums(rows).tolist() == [[1.0, 0.0, 0.0], [-3.0, -6.0, 0.0]]
    assert sign_sums(rows, [9.0, 2.0, torch.nan, 0.5]).tolist() == [[2.0, 0.0, 0.0], [-1.5, -6.0, 0.0]]
    sums = torch.empty(2, 3)
    kernels.sign_sums([None, None], None, sums)
    assert (sums == 0).all()


def test_rows_with_gaps_between_their_elements(backend):
    rows = torch.randn(3, 200)
    assert torch.equal(sign_sums(list(rows[:, ::2])), sign_sums(list(rows[:, ::2].contiguous())))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_column(backend, value):
    rows = torch.randn(3, 200)
    rows[1, 130] = value
    total = sign_sums(list(rows)).sum(dim=0)
    assert (~total.isfinite()).nonzero().tolist() == [[130]]


def test_the_number_of_threads_changes_no_bit(backend, with_threads):
    rows = list(torch.randn(5, 100_003))
    assert torch.equal(with_threads(1, lambda: sign_sums(rows)), with_threads(2, lambda: sign_sums(rows)))
