"""The Triton backend against the oracle: under Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpcgrad import reference
from fastpcgrad.backends import triton as backend
from fastpcgrad.variants import Guards
from tests.conftest import why_not_interpreted
from tests.ops import cases

pytest.importorskip("triton")
DEVICE = "cpu" if backend.why_unavailable("cpu") is None else "cuda"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="needs a GPU, or TRITON_INTERPRET=1 before triton is imported",
    ),
    # The interpreter computes with NumPy, which warns where a kernel meets NaN, inf or an overflow.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted()),
    # With NumPy before 2.4 the interpreter of Triton 3.6 runs, and this is what NumPy says of it.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# A rounding of the result, in 16 bits; of the sums, in fp32.
TOLERANCE = {FP16: 5e-4, BF16: 4e-3, FP32: 1e-6, FP64: 1e-14}
GRAM_TOLERANCE = {FP16: 1e-6, BF16: 1e-6, FP32: 1e-6, FP64: 1e-13}


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel reads before it is written shows."""

    def poison(create: Any) -> Any:
        def created(*arguments: Any, **options: Any) -> Tensor:
            tensor: Tensor = create(*arguments, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

        return created

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies by NumPy in fp32; this is what Triton makes of "tf32x3" on a GPU.

    The products of eight columns are added before they are rounded: one that leaves fp32's range is no inf by itself,
    and a tile's sum may become an inf of either sign.
    """
    if DEVICE == "cuda":
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    plain = interpreter.InterpreterBuilder.create_dot

    def cut(x: Any) -> Any:
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    def nearest(x: Any) -> Any:
        return cut((x.view(np.uint32) + np.uint32(0x1000)).view(np.float32))

    def add_products(total: Any, a: Any, b: Any) -> Any:
        for k in range(0, a.shape[-1], 8):
            products = a[..., k : k + 8].astype(np.float64) @ b[..., k : k + 8, :].astype(np.float64)
            total = (total + products).astype(np.float32)
        return total

    def create_dot(builder: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        if "TF32x3" not in str(precision) or a.data.dtype != np.float32:
            return plain(builder, a, b, total, precision, imprecise)
        high_a, high_b = nearest(a.data), nearest(b.data)
        small = add_products(np.zeros_like(total.data), cut(a.data - high_a), high_b)
        small = add_products(small, high_a, cut(b.data - high_b))
        products = add_products(np.where(np.isnan(small), np.float32(0), small), high_a, high_b)
        return interpreter.TensorHandle(total.data + products, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def random_rows(tasks: int, width: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * tasks + width)
    # A common part makes neighbours conflict or agree, not only noise.
    rows = torch.randn(tasks, width, generator=generator, dtype=FP64)
    signs = torch.tensor([(-1.0) ** t for t in range(tasks)], dtype=FP64)
    return (rows + 0.5 * signs[:, None] * rows[:1]).to(dtype).to(DEVICE)


def random_weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(DEVICE)


def random_order(tasks: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)]).to(DEVICE)


def combined(grads: Tensor, weights: Tensor, segments: Tensor | None = None) -> Tensor:
    out = torch.empty(grads.shape[1], dtype=grads.dtype, device=grads.device)
    backend.combine(grads, weights, segments, out)
    return out


def norms(grads: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grads.double(), dim=1)


def check_gram(gram: Tensor, grads: Tensor) -> None:
    expected, sizes = reference.gram(grads), norms(grads)
    assert gram.dtype == FP64 and gram.shape == expected.shape
    assert torch.equal(gram, gram.mT)
    bound = GRAM_TOLERANCE[grads.dtype] * sizes[:, None] * sizes
    assert ((gram - expected).abs() <= bound).all(), (gram - expected).abs().div(bound).nan_to_num().max()


def check_rows(found: Tensor, expected: Tensor, weights: Tensor, grads: Tensor) -> None:
    """‖m - m64‖ ≤ tol · Σ_j |w_j| ‖g_j‖, a bound for each row of weights."""
    assert found.dtype == grads.dtype
    error = torch.linalg.vector_norm(torch.atleast_2d(found.double() - expected), dim=1)
    bound = TOLERANCE[grads.dtype] * (torch.atleast_2d(weights.abs()) @ norms(grads))
    assert (error <= bound).all(), (error / bound).max()


def check_passes(grads: Tensor) -> None:
    tasks = grads.shape[0]
    check_gram(backend.gram(grads, None), grads)
    weights, coefficients = random_weights(tasks), random_weights(tasks, tasks)
    check_rows(combined(grads, weights), reference.combine(grads, weights), weights, grads)
    before = grads.clone()
    backend.mix_(grads, coefficients, None)
    check_rows(grads, reference.mix(before, coefficients), coefficients, before)


SHAPES = [
    *[(tasks, 1000, dtype) for tasks in (1, 2, 3, 8) for dtype in (FP16, BF16, FP32, FP64)],
    *[(17, width, dtype) for width, dtype in ((1000, BF16), (600, FP32), (129, FP64), (63, FP16))],
    *[(33, width, dtype) for width, dtype in ((200, FP32), (63, BF16), (1, FP64))],
    *[(tasks, width, FP32) for tasks in (1, 2, 3, 12, 13) for width in (1, 63)],
    *[(tasks, 5003, dtype) for tasks in (2, 8) for dtype in (BF16, FP32)],
]


@pytest.mark.parametrize(("tasks", "width", "dtype"), SHAPES)
def test_passes_match_the_oracle(tasks: int, width: int, dtype: torch.dtype) -> None:
    check_passes(random_rows(tasks, width, dtype))


@pytest.mark.parametrize(("tasks", "dtype"), [(3, FP32), (3, BF16), (13, FP32), (17, BF16)])
@pytest.mark.parametrize(("offset", "padding"), [(0, 16), (0, 3), (1, 15), (5, 0)])
def test_any_row_stride_and_start(tasks: int, dtype: torch.dtype, offset: int, padding: int) -> None:
    width = 1100 if tasks == 3 else 300
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


@pytest.mark.parametrize(("tasks", "dtype", "offset"), [(2, FP32, 0), (3, BF16, 1), (13, FP32, 0), (9, FP64, 1)])
def test_segments(tasks: int, dtype: torch.dtype, offset: int) -> None:
    offsets = SEGMENTS if tasks <= 3 else [0, 0, 3, 290, 400, 400]
    segments = torch.tensor(offsets, device=DEVICE)
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


@pytest.mark.parametrize("tasks", [3, 13])
@pytest.mark.parametrize("scale", cases.SUBNORMAL_SQUARES)
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


@pytest.mark.parametrize(("tasks", "dtype"), [(3, FP32), (3, BF16), (17, FP32)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_reaches_its_column_and_no_other(tasks: int, dtype: torch.dtype, bad: float) -> None:
    width = 700 if tasks == 3 else 140
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
    grads, order = random_rows(tasks, 1500, dtype), random_order(tasks)
    runs = []
    for _ in range(2):
        out = torch.empty(1500, dtype=dtype, device=DEVICE)
        gram, coefficients, _ = backend.pcgrad(grads, order, Guards(), 1.0, None, out)
        runs.append((out, gram, coefficients))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


SOLVES = [(1, {}), (2, {}), (8, {"self_projection": True}), (17, {"eps": 1e-8}), (33, {"min_squared_norm": 900.0})]


@pytest.mark.parametrize(("tasks", "options"), SOLVES)
def test_coefficients_match_the_oracle(tasks: int, options: dict[str, Any]) -> None:
    gram, order = reference.gram(random_rows(tasks, 40)), random_order(tasks)
    found = backend.pcgrad_coefficients(gram, order, Guards(**options))
    expected = reference.coefficients(gram.cpu(), order.cpu(), **options)
    assert torch.allclose(found.cpu(), expected, rtol=1e-11, atol=1e-12)


def test_eps_and_floor_arrive_in_float64() -> None:
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=FP64, device=DEVICE)
    order = torch.tensor([[0, 1], [0, 1]], device=DEVICE)
    coefficients = backend.pcgrad_coefficients(gram, order, Guards(False, 0.1, 0.0))
    assert float(coefficients[0, 1]) == 1 / (1 + 0.1)
    floor = 1 - 2.0**-40
    assert float(backend.pcgrad_coefficients(gram, order, Guards(False, 0.0, floor))[0, 1]) == 1
    assert float(backend.pcgrad_coefficients(gram, order, Guards(False, 0.0, 1.0))[0, 1]) == 0


def test_batched_coefficients_with_one_order_and_with_many() -> None:
    grams = torch.stack([reference.gram(random_rows(5, 30, seed=s)) for s in range(3)])
    orders = torch.stack([random_order(5, seed=s) for s in range(3)])
    for given in (orders[0], orders):
        found = backend.pcgrad_coefficients(grams, given, Guards())
        for s in range(3):
            order = given if given.dim() == 2 else given[s]
            expected = reference.coefficients(grams[s].cpu(), order.cpu())
            assert torch.allclose(found[s].cpu(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("entry", [-1, 4, 2**40])
def test_an_order_entry_out_of_range_poisons_its_row_alone(entry: int) -> None:
    gram, order = reference.gram(random_rows(4, 40)), random_order(4)
    expected = backend.pcgrad_coefficients(gram, order, Guards())
    order[2, 1] = entry
    found = backend.pcgrad_coefficients(gram, order, Guards())
    assert found[2].isnan().all()
    kept = [0, 1, 3]
    assert torch.equal(found[kept], expected[kept])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_task_does_not_spoil_the_others_tests(bad: float) -> None:
    gram, order = reference.gram(random_rows(4, 40)), random_order(4)
    gram[1, :] = gram[:, 1] = bad
    found = backend.pcgrad_coefficients(gram, order, Guards())
    kept = [0, 2, 3]
    without = torch.stack([torch.tensor([kept.index(j) for j in order[i].tolist() if j != 1]) for i in kept])
    expected = reference.coefficients(gram[kept][:, kept].cpu(), without)
    assert torch.allclose(found[kept][:, kept].cpu(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("tasks", "dtype", "scale"), [(2, FP32, 1.0), (5, FP32, 1e-30), (8, BF16, 1.0), (3, FP32, 1e18), (17, FP32, 1.0)]
)
def test_fused_pcgrad(tasks: int, dtype: torch.dtype, scale: float) -> None:
    width = 700 if tasks < 17 else 200
    grads, order = (random_rows(tasks, width).double() * scale).to(dtype), random_order(tasks)
    expected_gram = reference.gram(grads)
    expected = reference.coefficients(expected_gram.cpu(), order.cpu()).to(DEVICE)
    weights = expected.sum(dim=0) / tasks
    before, out = grads.clone(), grads[0]
    gram, _, _ = backend.pcgrad(grads, order, Guards(), 1 / tasks, None, out)
    check_gram(gram, before)
    check_rows(out, reference.combine(before, weights), weights, before)

    rows = before.clone()
    backend.pcgrad_(rows, order, Guards(), None)
    check_rows(rows, reference.mix(before, expected), expected, before)


@pytest.mark.parametrize("orders", [1, 4])
def test_fused_pcgrad_in_segments(orders: int) -> None:
    offsets = [0, 300, 300, 301, 1200]
    segments, grads = torch.tensor(offsets, device=DEVICE), random_rows(3, 1200)
    order = random_order(3) if orders == 1 else torch.stack([random_order(3, seed=s) for s in range(4)])
    out, rows = torch.empty(1200, device=DEVICE), grads.clone()
    gram, _, _ = backend.pcgrad(grads, order, Guards(), 1.0, segments, out)
    backend.pcgrad_(rows, order, Guards(), segments)
    for s in range(4):
        columns = slice(offsets[s], offsets[s + 1])
        part = grads[:, columns]
        expected = reference.coefficients(reference.gram(part).cpu(), (order if orders == 1 else order[s]).cpu())
        expected = expected.to(DEVICE)
        check_gram(gram[s], part)
        check_rows(out[columns], reference.combine(part, expected.sum(dim=0)), expected.sum(dim=0), part)
        check_rows(rows[:, columns], reference.mix(part, expected), expected, part)


def test_why_unavailable() -> None:
    assert backend.why_unavailable("cuda") is None
    ask = "from fastpcgrad.backends import triton; print(triton.why_unavailable('cpu'))"
    answer = subprocess.run([sys.executable, "-c", ask], env=compiling(), capture_output=True, text=True, check=True)
    assert "'cpu'" in answer.stdout and "TRITON_INTERPRET" in answer.stdout


def compiling() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}


def test_every_kernel_compiles_without_spills() -> None:
    script = Path(__file__).with_name("triton_aot.py")
    result = subprocess.run([sys.executable, str(script)], env=compiling(), capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
