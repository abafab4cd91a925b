"""pcgrad and pcgrad_: Gram matrix, projections, and the merged or the projected gradients in one call."""

import random

import pytest
import torch

import fastpcgrad
from fastpcgrad import reference, variants
from fastpcgrad.backends import kernels
from tests.ops import cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GUARDED = (
    cases.Case(8, 1000, torch.float32),
    cases.Case(3, 1000, torch.bfloat16, layout="unaligned", segments=(0, 0, 417, 1000)),
    cases.Case(8, 1000, torch.float32, "zero_rows"),
    cases.Case(3, 63, torch.float32, "opposites"),
    cases.Case(3, 1000, torch.float32, "tiny"),
    cases.Case(8, 1000, torch.float32, "mixed", "padded"),
)


def guards_of(name):
    return variants.get(name).guards


def options(case, variant="paper"):
    return {"variant": variant, "order": cases.order_of(case), "segments": case.segments}


def fused(packed, case, scale=1.0):
    """(merged, G, C, w) of the op itself."""
    segments = None if case.segments is None else torch.tensor(case.segments)
    return torch.ops.fastpcgrad.pcgrad(packed.grads, cases.order_of(case), False, 0.0, 0.0, scale, segments)


@cases.on_each_backend_by_tasks(cases.ALL, triton=cases.TINY)
def test_merged_is_the_oracles_within_tolerance(backend, group):
    for case in group:
        packed, weights = cases.Packed(case), cases.exact_coefficients(case).sum(dim=-2)
        found = fastpcgrad.pcgrad(packed.grads, reduction="sum", **options(case))
        assert found.dtype == case.dtype
        assert cases.error(found, packed.rows, weights, case.segments) <= cases.ROW_TOLERANCE[case.dtype]
        assert packed.is_untouched(), case


@cases.on_each_backend_by_tasks(cases.ALL, triton=cases.TINY)
def test_projected_in_place_are_the_oracles_within_tolerance(backend, group):
    for case in group:
        packed, matrix = cases.Packed(case), cases.exact_coefficients(case)
        assert fastpcgrad.pcgrad_(packed.grads, **options(case)) is packed.grads
        assert cases.error(packed.grads, packed.rows, matrix, case.segments) <= cases.ROW_TOLERANCE[case.dtype]
        assert packed.padding_is_untouched(), case


@pytest.mark.parametrize("variant", [name for name in variants.VARIANTS if name != "paper"])
@pytest.mark.parametrize("case", GUARDED, ids=str)
def test_each_variant_is_the_oracles_within_tolerance(backend, case, variant):
    rows, matrix = cases.rows_of(case), cases.exact_coefficients(case, variant)
    merged = fastpcgrad.pcgrad(rows, reduction="sum", **options(case, variant))
    projected = fastpcgrad.pcgrad_(rows.clone(), **options(case, variant))
    tolerance = cases.ROW_TOLERANCE[case.dtype]
    assert cases.error(merged, rows, matrix.sum(dim=-2), case.segments) <= tolerance
    assert cases.error(projected, rows, matrix, case.segments) <= tolerance


@pytest.mark.parametrize("count", [4, 8, 16])
def test_a_few_large_numbers_do_not_hide_many_small_ones(backend, count):
    # One large number in each lane; the small ones' squares are about half of its square's last place.
    rows = torch.tensor([[1.95e-3], [-1.96e-3]]).repeat(1, 1024)
    rows[:, :count] = torch.tensor([[10.0], [-10.0]])
    order = torch.tensor([[0, 1], [0, 1]])
    weights = reference.coefficients(reference.gram(rows), order).sum(dim=0)
    found = fastpcgrad.pcgrad(rows, order=order)
    assert cases.error(found, rows, weights) <= cases.ROW_TOLERANCE[torch.float32]


@cases.on_each_backend(cases.SOME)
def test_the_op_returns_what_it_merged_with_too(backend, case):
    packed = cases.Packed(case)
    merged, gram, matrix, weights = fused(packed, case, scale=0.25)
    assert torch.equal(gram, fastpcgrad.gram(packed.grads, case.segments))
    assert torch.equal(matrix, fastpcgrad.pcgrad_coefficients(gram, cases.order_of(case)))
    torch.testing.assert_close(weights, 0.25 * matrix.sum(dim=-2), rtol=1e-14, atol=1e-14)
    assert cases.error(merged, packed.rows, weights, case.segments) <= cases.ROW_TOLERANCE[case.dtype]


@cases.on_each_backend(cases.SOME)
def test_the_op_in_place_returns_the_matrices_of_the_rows_before(backend, case):
    packed, guards = cases.Packed(case), (False, 0.0, 0.0)
    _, gram, matrix, _ = fused(packed, case)
    segments = None if case.segments is None else torch.tensor(case.segments)
    found = torch.ops.fastpcgrad.pcgrad_(packed.grads, cases.order_of(case), *guards, segments)
    assert torch.equal(found[0], gram) and torch.equal(found[1], matrix)


@pytest.mark.parametrize("row", [0, -1])
@cases.on_each_backend(cases.SOME)
def test_out_may_be_a_row_of_j(backend, case, row):
    packed, guards = cases.Packed(case), (False, 0.0, 0.0)
    merged, *expected = fused(packed, case)
    rows = packed.rows.clone()
    rows[row] = merged
    segments = None if case.segments is None else torch.tensor(case.segments)
    found = torch.ops.fastpcgrad.pcgrad_out(
        packed.grads, cases.order_of(case), *guards, 1.0, segments, packed.grads[row]
    )
    assert torch.equal(packed.grads, rows) and packed.padding_is_untouched()
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("where", [None, 0, -1])
@cases.on_each_backend(cases.SOME)
def test_into_memory_that_is_given(backend, case, where):
    packed, rows = cases.Packed(case), cases.Packed(case).rows.clone()
    expected = fastpcgrad.pcgrad(rows, reduction="mean", **options(case))
    out = torch.full_like(expected, torch.nan) if where is None else packed.grads[where]
    version = out._version
    assert fastpcgrad.pcgrad(packed.grads, reduction="mean", out=out, **options(case)) is out
    assert torch.equal(out, expected) and out._version > version
    if where is None:
        assert packed.is_untouched(), case
    else:
        rows[where] = expected
        assert torch.equal(packed.grads, rows) and packed.padding_is_untouched()


BAD_OUT = {
    "dtype": (lambda J: torch.empty(5, dtype=torch.float64), ValueError, "out must be torch.float32 on cpu"),
    "length": (lambda J: torch.empty(4), ValueError, r"out must be contiguous \[5\]; found \[4\]"),
    "strides": (lambda J: torch.empty(10)[::2], ValueError, r"strides \(2,\)"),
    "overlap": (lambda J: J.view(-1)[2:7], ValueError, "out overlaps rows of grads"),
    "grad": (lambda J: torch.empty(5, requires_grad=True), RuntimeError, r"pcgrad with out= has no derivative"),
    "no tensor": (lambda J: [0.0] * 5, TypeError, "out must be a torch.Tensor; found list"),
}


@pytest.mark.parametrize("name", BAD_OUT)
def test_memory_that_cannot_be_written_is_refused(backend, name):
    J = torch.randn(3, 5)
    make, error, message = BAD_OUT[name]
    before, state = J.clone(), torch.get_rng_state()
    with pytest.raises(error, match=message):
        fastpcgrad.pcgrad(J, out=make(J))
    assert torch.equal(J, before)
    assert name == "overlap" or torch.equal(torch.get_rng_state(), state), "nothing is drawn for a call that is refused"
    with pytest.raises(ValueError, match="out is for the merged gradient"):
        fastpcgrad.pcgrad(J, reduction="none", out=torch.empty(5))
    with pytest.raises(RuntimeError, match="has no derivative"):
        fastpcgrad.pcgrad(J.requires_grad_(), out=torch.empty(5))


@cases.on_each_backend(cases.SOME)
def test_without_reduction_the_rows_are_those_of_the_in_place_form(backend, case):
    packed = cases.Packed(case)
    rows = fastpcgrad.pcgrad(packed.grads, reduction="none", **options(case))
    assert packed.is_untouched()
    assert torch.equal(rows, fastpcgrad.pcgrad_(packed.grads, **options(case)))


@cases.on_each_backend(cases.SOME)
def test_the_mean_is_the_sum_divided_by_t(backend, case):
    rows, matrix = cases.rows_of(case), cases.exact_coefficients(case)
    found = fastpcgrad.pcgrad(rows, reduction="mean", **options(case))
    weights = matrix.sum(dim=-2) / case.tasks
    assert cases.error(found, rows, weights, case.segments) <= cases.ROW_TOLERANCE[case.dtype]


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_the_reduction_is_the_variants_own_unless_it_is_given(backend, variant):
    case = GUARDED[0]
    rows = cases.rows_of(case)
    own, mean, total = (
        fastpcgrad.pcgrad(rows, reduction=reduction, **options(case, variant)) for reduction in (None, "mean", "sum")
    )
    assert torch.equal(own, mean if variant in ("pytorch-pcgrad", "tensorlogic") else total)
    assert not torch.equal(mean, total)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_single_task_is_itself(backend, dtype, variant):
    rows = torch.randn(1, 1000).to(dtype)
    assert torch.equal(fastpcgrad.pcgrad(rows, variant=variant), rows[0])
    assert torch.equal(fastpcgrad.pcgrad_(rows.clone(), variant=variant), rows)


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_without_conflict_the_merged_gradient_is_the_plain_sum(backend, variant):
    rows = torch.rand(8, 1000)
    found = fastpcgrad.pcgrad(rows, variant=variant, reduction="sum")
    assert torch.equal(found, fastpcgrad.combine(rows, torch.ones(8, dtype=torch.float64)))
    assert torch.equal(fastpcgrad.pcgrad_(rows.clone(), variant=variant), rows)


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_zero_gradients_give_zero(backend, variant):
    for rows in (torch.zeros(4, 100), torch.zeros(4, 0)):
        merged = fastpcgrad.pcgrad(rows, variant=variant)
        assert torch.equal(merged, rows[0]) and torch.equal(fastpcgrad.pcgrad_(rows, variant=variant), rows)


def test_exact_opposites_cancel(backend):
    row = torch.randn(1000)
    assert fastpcgrad.pcgrad(torch.stack([row, -2 * row])).abs().max() <= 1e-5


@pytest.mark.parametrize("exponent", [-40, -7, 1, 30])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_powers_of_two_pass_through_to_the_bit(backend, exponent, reduction):
    case = GUARDED[0]
    rows, scale = cases.rows_of(case), 2.0**exponent
    expected = fastpcgrad.pcgrad(rows, reduction=reduction, **options(case)) * scale
    assert torch.equal(fastpcgrad.pcgrad(rows * scale, reduction=reduction, **options(case)), expected)


def test_the_scale_of_one_task_changes_no_other_projected_row_to_the_bit(backend):
    case = GUARDED[0]
    rows, scales = cases.rows_of(case), 2.0 ** torch.arange(-12.0, 12.0, 3.0)[:, None]
    expected = fastpcgrad.pcgrad_(rows.clone(), **options(case)) * scales
    assert torch.equal(fastpcgrad.pcgrad_(rows * scales, **options(case)), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_scale_with_the_gradients(backend, dtype, scale):
    rows = (torch.randn(8, 1000) * scale).to(dtype)
    order = torch.stack([torch.randperm(8) for _ in range(8)])
    weights = reference.coefficients(reference.gram(rows), order).sum(dim=0)
    found = fastpcgrad.pcgrad(rows, order=order)
    assert weights.max() > 1 and cases.error(found, rows, weights) <= cases.ROW_TOLERANCE[dtype]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_value_that_is_not_finite_arrives_at_its_place_and_changes_no_other(backend, dtype, bad):
    # No gradient is zero at the place: the bad row's dot products are all infinite or NaN.
    rows, good = torch.randn(5, 300).to(dtype), torch.tensor([0, 1, 3, 4])
    order = torch.stack([torch.randperm(5) for _ in range(5)])
    spoiled = rows.clone()
    spoiled[2, 150] = bad
    # The bad row takes part in no projection: the others are projected as if it were zero there.
    gram = reference.gram(rows)
    gram[2] = gram[:, 2] = 0
    matrix = reference.coefficients(gram, order)

    merged = fastpcgrad.pcgrad(spoiled, order=order)
    projected = fastpcgrad.pcgrad_(spoiled.clone(), order=order)
    assert not merged[150].isfinite() and not projected[2, 150].isfinite()
    assert merged.isfinite().sum() == 299 and not projected[good, 150].isfinite().any()
    rows[:, 150] = merged[150] = projected[:, 150] = 0
    assert cases.error(merged, rows, matrix.sum(dim=0)) <= cases.ROW_TOLERANCE[dtype]
    assert cases.error(projected, rows, matrix) <= cases.ROW_TOLERANCE[dtype]


def test_a_value_that_is_not_finite_stays_in_its_segment(backend):
    rows = torch.randn(4, 300)
    expected = fastpcgrad.pcgrad(rows, variant="tensorflow", segments=[0, 100, 200, 300])
    rows[1, 150] = torch.nan
    found = fastpcgrad.pcgrad(rows, variant="tensorflow", segments=[0, 100, 200, 300])
    outside = torch.ones(300, dtype=torch.bool).index_fill(0, torch.arange(100, 200), False)
    torch.testing.assert_close(found[outside], expected[outside], rtol=1e-5, atol=1e-5)
    assert found.isnan().nonzero().tolist() == [[150]]


def test_an_index_out_of_range_makes_the_merged_gradient_nan(backend):
    rows, order = torch.randn(3, 50), torch.arange(3).repeat(3, 1)
    order[1, 0] = 3
    # The kernels, as a GPU's tensors reach them: nobody looks at the numbers of the order before.
    assert kernels.pcgrad(rows, order, False, 0.0, 0.0, 1.0, None)[0].isnan().all()
    kernels.pcgrad_(rows, order, False, 0.0, 0.0, None)
    assert rows[1].isnan().all() and rows[[0, 2]].isfinite().all()


def test_each_segment_is_a_problem_of_its_own(backend):
    rows, segments = torch.randn(4, 300), [0, 100, 100, 300]
    orders = torch.stack([torch.stack([torch.randperm(4) for _ in range(4)]) for _ in range(3)])
    found = fastpcgrad.pcgrad(rows, order=orders, segments=segments)
    first = fastpcgrad.pcgrad(rows[:, :100], order=orders[0])
    last = fastpcgrad.pcgrad(rows[:, 100:], order=orders[2])
    torch.testing.assert_close(found, torch.cat([first, last]), rtol=1e-5, atol=1e-5)


def test_one_order_serves_all_segments(backend):
    rows, segments = torch.randn(4, 300), [0, 100, 300]
    order = torch.stack([torch.randperm(4) for _ in range(4)])
    found = fastpcgrad.pcgrad(rows, order=order, segments=segments)
    assert torch.equal(found, fastpcgrad.pcgrad(rows, order=order.repeat(2, 1, 1), segments=segments))


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_segments_draw_one_order_after_the_other(backend, variant):
    rows, segments = torch.randn(4, 300), [0, 100, 300]
    generator = random.Random(5)
    orders = torch.stack([variants.get(variant).draw_order(4, generator) for _ in range(2)])
    found = fastpcgrad.pcgrad(rows, variant=variant, generator=random.Random(5), segments=segments)
    assert torch.equal(found, fastpcgrad.pcgrad(rows, variant=variant, order=orders, segments=segments))


@pytest.mark.parametrize("segments", [None, [0, 10, 10, 150_000, 300_007]], ids=["whole", "segments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_threads(backend, with_threads, dtype, segments):
    rows = torch.randn(5, 300_007).to(dtype)
    order = torch.stack([torch.randperm(5) for _ in range(5)])
    for reduction in ("sum", "none"):
        call = lambda: fastpcgrad.pcgrad(rows, reduction=reduction, order=order, segments=segments)  # noqa: B023, E731
        one, two, again = (with_threads(n, call) for n in (1, 2, 2))
        assert torch.equal(one, two) and torch.equal(two, again)
