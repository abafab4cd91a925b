"""The two passes of the Triton backend against the oracle: under the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from fastpcgrad import reference
from fastpcgrad.backends import triton as backend
from fastpcgrad.variants import Guards
from tests.backends.triton.rows import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    FP64,
    MARKS,
    check_gram,
    check_passes,
    check_rows,
    combined,
    random_order,
    random_rows,
    random_weights,
)
from tests.ops import cases

pytest.importorskip("triton")
pytestmark = MARKS


SHAPES = [
    *[(tasks, 1000, dtype) for tasks in (1, 2, 3, 8) for dtype in (FP16, BF16, FP32, FP64)],
    *[(17, width, dtype) for width, dtype in ((300, BF16), (200, FP32), (129, FP64), (63, FP16))],
    *[(33, width, dtype) for width, dtype in ((63, BF16), (1, FP32))],
    *[(tasks, width, FP32) for tasks in (1, 2, 3, 12, 13) for width in (1, 63)],
    *[(2, 5003, BF16), (8, 5003, FP32)],
]


@pytest.mark.parametrize(("tasks", "width", "dtype"), SHAPES)
def test_passes_match_the_oracle(tasks: int, width: int, dtype: torch.dtype) -> None:
    check_passes(random_rows(tasks, width, dtype))


@pytest.mark.parametrize(("tasks", "dtype"), [(3, FP32), (3, BF16), (13, FP32), (17, BF16)])
@pytest.mark.parametrize(("offset", "padding"), [(0, 16), (0, 3), (1, 15), (5, 0)])
def test_any_row_stride_and_start(tasks: int, dtype: torch.dtype, offset: int, padding: int) -> None:
    width = 1100 if tasks == 3 else 150
    storage = random_rows(tasks, offset + width + padding, dtype)
    grads = storage[:, offset : offset + width]
    outside = storage.clone()
    check_passes(grads)
    assert torch.equal(storage[:, :offset], outside[:, :offset])
    assert torch.equal(storage[:, offset + width :], outside[:, offset + width :])


def test_no_columns() -> None:
    grads = torch.zeros(3, 0, device=DEVICE)
    assert torch.equal(backend.gram(grads, None), torch.zeros(3, 3, dtype=FP64, device=DEVICE))
    offsets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert backend.gram(grads, offsets).eq(0).all() and backend.gram(grads, offsets).shape == (2, 3, 3)
    assert combined(grads, random_weights(3)).shape == (0,)
    backend.mix_(grads, random_weights(3, 3), None)
    gram, coefficients = backend.pcgrad_(grads, random_order(3), Guards(), None)
    assert gram.eq(0).all() and torch.equal(coefficients, torch.eye(3, dtype=FP64, device=DEVICE))


SEGMENTS = [0, 0, 5, 6, 700, 700, 1536, 2048, 2600, 2600]


@pytest.mark.parametrize("apart", [1, 2], ids=["dense", "every other offset"])
@pytest.mark.parametrize(("tasks", "dtype", "offset"), [(2, FP32, 0), (3, BF16, 1), (13, FP32, 0), (9, FP64, 1)])
def test_segments(tasks: int, dtype: torch.dtype, offset: int, apart: int) -> None:
    offsets = SEGMENTS if tasks <= 3 else [0, 0, 3, 140, 200, 200]
    segments = torch.tensor(offsets, device=DEVICE).repeat_interleave(apart)[::apart]
    grads = random_rows(tasks, offsets[-1] + offset, dtype)[:, offset:]
    count = len(offsets) - 1
    gram = backend.gram(grads, segments)
    weights, coefficients = random_weights(count, tasks), random_weights(count, tasks, tasks)
    out, before = combined(grads, weights, segments), grads.clone()
    backend.mix_(grads, coefficients, segments)
    assert gram.shape == (count, tasks, tasks)
    for s in range(count):
        columns = slice(offsets[s], offsets[s + 1])
        part = before[:, columns]
        check_gram(gram[s], part)
        check_rows(out[columns], reference.combine(part, weights[s]), weights[s], part)
        check_rows(grads[:, columns], reference.mix(part, coefficients[s]), coefficients[s], part)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_mix_of_many_tasks(dtype: torch.dtype) -> None:
    grads, coefficients = random_rows(130, 70, dtype), random_weights(130, 130)
    expected, before = reference.mix(grads, coefficients), grads.clone()
    backend.mix_(grads, coefficients, None)
    check_rows(grads, expected, coefficients, before)


def test_more_segments_than_blocks() -> None:
    offsets = [*range(0, 13, 2), 12, 13]
    segments = torch.tensor(offsets, device=DEVICE)
    grads, weights = random_rows(2, 13), random_weights(len(offsets) - 1, 2)
    assert torch.allclose(backend.gram(grads, segments), reference.gram(grads, segments), rtol=1e-6, atol=1e-9)
    expected = reference.combine(grads, weights, segments)
    assert torch.allclose(combined(grads, weights, segments).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "taken"), [([0, 40, 900], [0, 40, 70]), ([0, 90, 70], [0, 70, 70]), ([-9, 40, 70], [0, 40, 70])]
)
def test_offsets_on_a_device_that_nobody_looked_at_reach_no_other_columns(given: list[int], taken: list[int]) -> None:
    """To look at them would be to wait for the device; what is beyond a row would be another row's, or nobody's."""
    wrong, right = torch.tensor(given, device=DEVICE), torch.tensor(taken, device=DEVICE)
    grads, weights = random_rows(3, 1000)[:, :70], random_weights(2, 3)
    assert torch.equal(backend.gram(grads, wrong), backend.gram(grads, right))
    assert torch.equal(combined(grads, weights, wrong), combined(grads, weights, right))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_zero_rows_duplicates_and_opposites(dtype: torch.dtype) -> None:
    grads = random_rows(5, 1500, dtype)
    grads[1] = 0
    grads[3] = grads[2]
    grads[4] = -grads[2]
    gram = backend.gram(grads, None)
    check_gram(gram, grads)
    assert gram[1].eq(0).all() and gram[:, 1].eq(0).all()
    assert gram[2, 2] == gram[3, 3] == gram[2, 3] == -gram[2, 4]
    coefficients = backend.pcgrad_coefficients(gram, random_order(5), Guards())
    assert coefficients.isfinite().all()


@pytest.mark.parametrize(
    ("tasks", "dtype", "scale"),
    [*[(3, FP32, scale) for scale in (1e-30, 1e18, 1e30)], (4, BF16, 1e-30), (4, BF16, 1e18), (13, FP32, 1e-30)],
)
def test_gram_at_scales_whose_squares_fp32_cannot_hold(tasks: int, dtype: torch.dtype, scale: float) -> None:
    grads = random_rows(tasks, 1100 if tasks < 13 else 300).double()
    check_gram(backend.gram((grads * scale).to(dtype), None), (grads * scale).to(dtype))
    # Beside rows of ordinary scale, one of the other extreme, and one of zeros.
    grads[1] *= scale
    grads[-1] *= 1 / scale
    grads[tasks // 2 - 1] = 0
    mixed = grads.to(dtype)
    check_gram(backend.gram(mixed, None), mixed)


@pytest.mark.parametrize(("tasks", "scale"), [*((3, scale) for scale in cases.SUBNORMAL_SQUARES), (13, 1e-22)])
def test_gram_at_scales_whose_squares_fp32_holds_but_in_part(tasks: int, scale: float) -> None:
    grads = cases.rows_of_one_size(tasks, 600 if tasks < 13 else 300, scale).to(DEVICE)
    grads[1] /= scale
    check_gram(backend.gram(grads, None), grads)


@pytest.mark.parametrize("tasks", [3, 17])
def test_a_row_at_the_end_of_fp32s_range_beside_rows_of_zeros(tasks: int) -> None:
    """Rounded to tf32 such a number is inf, and its products with zeros are NaN."""
    grads = random_rows(tasks, 140)
    grads[1] = torch.finfo(FP32).max * grads[1].sign()
    grads[[0, -1]] = 0
    check_gram(backend.gram(grads, None), grads)


def test_scales_in_segments() -> None:
    grads = random_rows(3, 2100)
    grads[0, :1000] *= 1e-30
    grads[1, 1000:] *= 1e30
    grads[2, :1000] = 0
    segments = torch.tensor([0, 1000, 1000, 1700, 2100], device=DEVICE)
    gram = backend.gram(grads, segments)
    for s, (a, b) in enumerate([(0, 1000), (1000, 1000), (1000, 1700), (1700, 2100)]):
        check_gram(gram[s], grads[:, a:b])


@pytest.mark.parametrize("tasks", [3, 17])
@pytest.mark.parametrize("scale", [1e-36, 1e34])
def test_weights_that_fp32_cannot_hold(tasks: int, scale: float) -> None:
    grads = random_rows(tasks, 600)
    weights, coefficients = random_weights(tasks), random_weights(tasks, tasks)
    grads[0] /= scale
    weights[0] *= scale
    coefficients[:, 0] *= scale
    check_rows(combined(grads, weights), reference.combine(grads, weights), weights, grads)
    before = grads.clone()
    backend.mix_(grads, coefficients, None)
    check_rows(grads, reference.mix(before, coefficients), coefficients, before)


def test_a_weight_that_fp32_cannot_hold_in_the_last_tile_of_coefficients() -> None:
    grads, coefficients = random_rows(33, 130), random_weights(33, 33)
    grads[0] /= 1e34
    coefficients[32, 0] *= 1e45
    before = grads.clone()
    backend.mix_(grads, coefficients, None)
    check_rows(grads, reference.mix(before, coefficients), coefficients, before)


@pytest.mark.parametrize(
    ("tasks", "dtype", "bad"),
    [*[(3, dtype, bad) for dtype in (FP32, BF16) for bad in (torch.nan, torch.inf)], (17, FP32, torch.inf)],
)
def test_a_bad_value_reaches_its_column_and_no_other(tasks: int, dtype: torch.dtype, bad: float) -> None:
    width = 700 if tasks == 3 else 70
    clean = random_rows(tasks, width, dtype)
    grads = clean.clone()
    columns = [0, 2 * width // 3, width - 1]
    grads[1, columns] = bad
    weights, coefficients = random_weights(tasks), random_weights(tasks, tasks)
    weights[1] = 0
    coefficients[:, 1] = 0
    out = combined(grads, weights)
    others = torch.ones(width, dtype=torch.bool, device=DEVICE)
    others[columns] = False
    assert out[columns].isnan().all() and torch.equal(out[others], combined(clean, weights)[others])
    mixed, expected = grads.clone(), clean.clone()
    backend.mix_(mixed, coefficients, None)
    backend.mix_(expected, coefficients, None)
    assert mixed[:, columns].isnan().all() and torch.equal(mixed[:, others], expected[:, others])

    gram, without = backend.gram(grads, None), backend.gram(clean, None)
    kept = [t for t in range(tasks) if t != 1]
    assert not gram[1].isfinite().any() and not gram[:, 1].isfinite().any()
    assert torch.equal(gram[kept][:, kept], without[kept][:, kept])


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("segmented", [False, True])
def test_out_may_be_a_row(row: int, segmented: bool) -> None:
    segments = torch.tensor([0, 100, 1300, 1300], device=DEVICE) if segmented else None
    grads = random_rows(3, 1300)
    weights = random_weights(3, 3) if segmented else random_weights(3)
    expected, before = combined(grads, weights, segments), grads.clone()
    backend.combine(grads, weights, segments, grads[row])
    assert torch.equal(grads[row], expected)
    kept = [t for t in range(3) if t != row]
    assert torch.equal(grads[kept], before[kept])


@pytest.mark.parametrize("tasks", [3, 14])
def test_a_columns_bits_do_not_depend_on_where_it_lies(tasks: int) -> None:
    grads, weights = random_rows(tasks, 1300), random_weights(tasks)
    whole = combined(grads, weights)
    for start, end in ((1, 1300), (512, 1024), (700, 703)):
        assert torch.equal(combined(grads[:, start:end], weights), whole[start:end])


@pytest.mark.parametrize(("tasks", "dtype"), [(4, FP32), (13, FP32), (9, BF16)])
def test_same_bits_every_time(tasks: int, dtype: torch.dtype) -> None:
    width = 1500 if tasks < 9 else 600  # of several blocks
    grads, order = random_rows(tasks, width, dtype), random_order(tasks)
    runs = []
    for _ in range(2):
        out = torch.empty(width, dtype=dtype, device=DEVICE)
        gram, coefficients, _ = backend.pcgrad(grads, order, Guards(), 1.0, None, out)
        runs.append((out, gram, coefficients))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("column", [0, 1, 599])
def test_a_row_whose_one_number_has_a_square_below_fp32s_range(column: int) -> None:
    rows = random_rows(3, 600)
    rows[1] = 0
    rows[1, column] = 1e-30
    check_gram(backend.gram(rows, None), rows)
