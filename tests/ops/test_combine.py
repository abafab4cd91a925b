"""combine: w J."""

import pytest
import torch

import fastpcgrad
from fastpcgrad import reference
from tests.ops import cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


@cases.on_each_backend_by_tasks(cases.ALL, triton=cases.TINY)
def test_is_the_oracles_within_tolerance(backend, group):
    for case in group:
        packed, weights = cases.Packed(case), cases.weights_of(case)
        found = fastpcgrad.combine(packed.grads, weights, segments=case.segments)
        assert found.dtype == case.dtype
        assert cases.error(found, packed.rows, weights, case.segments) <= cases.ROW_TOLERANCE[case.dtype]


@cases.on_each_backend(cases.SOME)
def test_leaves_the_rows_alone(backend, case):
    packed = cases.Packed(case)
    fastpcgrad.combine(packed.grads, cases.weights_of(case), segments=case.segments)
    assert packed.is_untouched()


@cases.on_each_backend(cases.SOME)
def test_out_is_written_and_returned(backend, case):
    packed, weights = cases.Packed(case), cases.weights_of(case)
    storage = torch.full((case.width + 2,), torch.nan, dtype=case.dtype)
    out = storage[1:-1]
    assert fastpcgrad.combine(packed.grads, weights, out, segments=case.segments) is out
    assert torch.equal(out, fastpcgrad.combine(packed.grads, weights, segments=case.segments))
    assert storage[[0, -1]].isnan().all() and packed.is_untouched()


@pytest.mark.parametrize("row", [0, -1])
@cases.on_each_backend((*cases.SOME, cases.Case(17, 100_003, torch.float32)))
def test_out_may_be_a_row_of_j(backend, case, row):
    packed, weights = cases.Packed(case), cases.weights_of(case)
    expected = packed.rows.clone()
    expected[row] = fastpcgrad.combine(packed.grads, weights, segments=case.segments)
    fastpcgrad.combine(packed.grads, weights, packed.grads[row], segments=case.segments)
    assert torch.equal(packed.grads, expected) and packed.padding_is_untouched()


@pytest.mark.parametrize("width", [7, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@cases.on_all_backends
def test_what_lies_in_the_middle_is_rounded_to_even(backend, dtype, width):
    half = torch.finfo(dtype).eps / 2
    lower = torch.arange(width) % 2 * 2 * half + 1  # even and odd by turns, and half a step above
    rows = torch.stack([lower, torch.full((width,), half)]).to(dtype)
    assert torch.equal(fastpcgrad.combine(rows, doubles(1, 1)), (lower.double() + half).to(dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("tasks", [2, 9])
def test_a_zero_weight_does_not_hide_a_value_that_is_not_finite(backend, tasks, dtype, bad):
    rows, weights = torch.randn(tasks, 300).to(dtype), torch.ones(tasks, dtype=torch.float64)
    weights[1] = 0
    places = [0, 130, 299]
    clean = rows.clone()
    rows[1, places] = bad
    found = fastpcgrad.combine(rows, weights)
    assert found[places].isnan().all()
    clean[:, places] = found[places] = 0
    assert cases.error(found, clean, weights) <= cases.ROW_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_inf_keeps_its_sign(backend, dtype):
    rows = torch.ones(3, 40, dtype=dtype)
    rows[0, 3], rows[2, 39] = torch.inf, torch.inf
    found = fastpcgrad.combine(rows, doubles(2.0, 1.0, -1.0))
    assert found[3] == torch.inf and found[39] == -torch.inf
    assert (found == torch.inf).sum() == (found == -torch.inf).sum() == 1 and not found.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_survives_a_weight_of_one(backend, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    # Once as whole vectors, once shifted so that each ends in columns that do not fill one.
    for numbers in (every, every[5:]):
        found = fastpcgrad.combine(numbers[None], doubles(1.0))
        torch.testing.assert_close(found, numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_to_the_nearest_even(backend, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = every[every.isfinite()]
    neighbours = torch.stack([numbers, numbers.roll(1)])
    # Halfway between two neighbours, and a little to either side: exact in fp32, so only the last rounding counts.
    for weights in (doubles(0.5, 0.5), doubles(0.53125, 0.46875), doubles(0.46875, 0.53125)):
        sums = (weights.float()[:, None] * neighbours.float()).sum(dim=0)
        inner = (numbers.sign() == numbers.roll(1).sign()) & ((sums.abs() > 1e-30) | (dtype == torch.float16))
        found = fastpcgrad.combine(neighbours, weights)
        assert torch.equal(found[inner], sums.to(dtype)[inner])
        for first in range(0, len(numbers), 211):  # fewer columns than a vector has
            part = slice(first, first + 7)
            found = fastpcgrad.combine(neighbours[:, part], weights)
            assert torch.equal(found[inner[part]], sums[part].to(dtype)[inner[part]])


def test_fp16_results_beyond_65504_are_inf(backend):
    rows = torch.tensor([[65504.0, 65504.0, 65504.0, -65504.0]], dtype=torch.float16).repeat(1, 20)
    assert torch.equal(fastpcgrad.combine(rows, doubles(1.5)), rows[0] * torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("weight", "scale"), [(1e-45, 1e30), (1e-60, 1e37), (1e45, 1e-38), (2.0**120, 2.0**-120)])
def test_weights_that_fp32_cannot_hold(backend, dtype, weight, scale):
    rows = (torch.randn(3, 100) * scale).to(dtype)
    weights = doubles(weight, -weight, 0.0)
    found = fastpcgrad.combine(rows, weights)
    assert found.isfinite().all() and found.count_nonzero() > 0
    assert cases.error(found, rows, weights) <= 2 * cases.ROW_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_one_task_with_weight_one_is_itself(backend, dtype):
    rows = torch.randn(1, 1001).to(dtype)
    assert torch.equal(fastpcgrad.combine(rows, doubles(1.0)), rows[0])


def test_weights_may_be_strided(backend):
    rows, weights = torch.randn(4, 50), torch.randn(8, dtype=torch.float64)
    assert torch.equal(fastpcgrad.combine(rows, weights[::2]), fastpcgrad.combine(rows, weights[::2].clone()))


def test_each_segment_has_weights_of_its_own(backend):
    rows = torch.arange(12.0).reshape(2, 6)
    weights = doubles(1, 0, 9, 9, 0, 1).reshape(3, 2)
    found = fastpcgrad.combine(rows, weights, segments=[0, 2, 2, 6])
    assert found.tolist() == [0, 1, 8, 9, 10, 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [0, 1])
def test_results_too_large_for_the_caches(backend, with_threads, dtype, start):
    width = 2_200_000
    rows = torch.randn(1, width + 1).to(dtype).expand(2, -1)[:, start : start + width]
    weights = doubles(0.5, 0.25)  # exact but for the last rounding
    one, two = (with_threads(n, lambda: fastpcgrad.combine(rows, weights)) for n in (1, 2))
    assert torch.equal(one, (rows[0].double() * 0.75).to(dtype)) and torch.equal(one, two)


@pytest.mark.parametrize("segments", [None, [0, 10, 10, 150_000, 300_007]], ids=["whole", "segments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_threads(backend, with_threads, dtype, segments):
    rows = torch.randn(9, 300_007).to(dtype)
    weights = torch.randn(9, dtype=torch.float64)
    if segments is not None:
        weights = weights * doubles(1, 2, 3, 4)[:, None]
    call = lambda: fastpcgrad.combine(rows, weights, segments=segments)  # noqa: E731
    one, two, again = (with_threads(n, call) for n in (1, 2, 2))
    assert torch.equal(one, two) and torch.equal(two, again)


def test_n_zero_gives_an_empty_gradient(backend):
    assert fastpcgrad.combine(torch.zeros(3, 0), doubles(1, 2, 3)).shape == (0,)


def test_the_oracle_adds_in_float64():
    rows = torch.tensor([[1.0], [1e-12]])
    assert reference.combine(rows, doubles(1.0, 1.0)).item() == 1.0 + float(rows[1, 0])
