"""The CUDA backend against the oracle: on a GPU where there is one, else its sources on a CPU (``cuda_emulated``)."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastpcgrad import _modes, backends, reference
from fastpcgrad.backends import cuda, eager
from fastpcgrad.variants import Guards
from tests.backends.cuda_emulated import CXX, DEVICE, GPU
from tests.ops import cases

pytestmark = [
    pytest.mark.skipif(not (GPU or CXX), reason="needs a GPU with the CUDA library, or a C++ compiler"),
    pytest.mark.usefixtures("poisoned_memory", "library"),
]
LAUNCHES = [cuda.ONE_LAUNCH, cuda.SEVERAL_LAUNCHES]


class Given(cases.Packed):
    """A case's J, segments, weights, coefficients and order on the device."""

    def __init__(self, case):
        super().__init__(case)
        place = self.grads.shape, self.grads.stride(), self.grads.storage_offset()
        self.storage = self.storage.to(DEVICE)
        self.grads = self.storage.as_strided(*place)
        self.segments = None if case.segments is None else torch.tensor(case.segments, device=DEVICE)
        self.order = cases.order_of(case).to(DEVICE)


def assert_is_gram(found, case):
    exact = reference.gram(cases.rows_of(case), case.segments)
    norms = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    bound = cases.GRAM_TOLERANCE[case.dtype] * norms[..., :, None] * norms[..., None, :]
    assert found.shape == exact.shape and torch.equal(found, found.mT)
    assert bool(((found.cpu() - exact).abs() <= bound).all())


def assert_is_product(found, case, weights):
    assert found.dtype == case.dtype
    assert cases.error(found.cpu(), cases.rows_of(case), weights, case.segments) <= cases.ROW_TOLERANCE[case.dtype]


# Fibers take minutes for the widest of these.
CASES = [case for case in cases.ALL if GPU or case.tasks * case.width < 2_000_000]
TILED = [
    cases.Case(tasks, width, dtype, layout=layout)
    for tasks, width, dtype, layout in (
        (9, 1000, torch.float32, "dense"),
        (16, 3001, torch.bfloat16, "padded"),
        (12, 700, torch.float16, "unaligned"),
        (65, 600, torch.float32, "padded"),
        (65, 300, torch.float64, "dense"),
        (70, 520, torch.bfloat16, "padded"),
    )
]


@pytest.mark.parametrize("case", [*CASES, *TILED], ids=str)
def test_gram(case):
    given = Given(case)
    assert_is_gram(cuda.gram(given.grads, given.segments), case)
    assert given.padding_is_untouched()


@pytest.mark.parametrize("case", [*CASES, *TILED], ids=str)
def test_combine(case):
    given, weights = Given(case), cases.weights_of(case)
    out = torch.empty(case.width, dtype=case.dtype, device=DEVICE)
    cuda.combine(given.grads, weights.to(DEVICE), given.segments, out)
    assert_is_product(out, case, weights)
    assert given.padding_is_untouched()


@pytest.mark.parametrize("case", [*CASES, *TILED], ids=str)
def test_mix(case):
    given, matrix = Given(case), cases.matrix_of(case)
    cuda.mix_(given.grads, matrix.to(DEVICE), given.segments)
    assert_is_product(given.grads, case, matrix)
    assert given.padding_is_untouched()


@pytest.mark.parametrize("case", [*CASES, *TILED[:3]], ids=str)
def test_pcgrad_is_the_same_in_one_launch_and_in_several(case, monkeypatch):
    exact, results = cases.exact_coefficients(case), []
    for launches in LAUNCHES:
        monkeypatch.setattr(cuda, "launches", launches)
        given = Given(case)
        out = torch.empty(case.width, dtype=case.dtype, device=DEVICE)
        gram, coefficients, weights = cuda.pcgrad(given.grads, given.order, Guards(), 0.5, given.segments, out)
        in_place = cuda.pcgrad_(given.grads, given.order, Guards(), given.segments)
        assert given.padding_is_untouched()
        results.append((out, gram, coefficients, weights, given.grads, *in_place))
    assert all(torch.equal(one, several) for one, several in zip(*results, strict=True))
    assert_is_gram(gram, case)
    assert_is_product(out, case, 0.5 * exact.sum(dim=-2))
    assert_is_product(given.grads, case, exact)


@pytest.mark.parametrize("case", [cases.SOME[1], cases.SOME[3]], ids=str)
@pytest.mark.parametrize("launches", LAUNCHES)
def test_without_figures_the_gradients_are_the_same(case, launches, monkeypatch):
    monkeypatch.setattr(cuda, "launches", launches)
    merged, rows = [], []
    for figures in (True, False):
        given, out = Given(case), torch.empty(case.width, dtype=case.dtype, device=DEVICE)
        arguments = given.grads, given.order, Guards()
        assert bool(cuda.pcgrad(*arguments, 1.0, given.segments, out, figures)) == figures
        assert bool(cuda.pcgrad_(*arguments, given.segments, figures)) == figures
        merged.append(out)
        rows.append(given.grads)
    assert torch.equal(*merged) and torch.equal(*rows)


def test_the_devices_plain_tensors_need_no_dispatcher():
    assert not _modes.is_watched((torch.randn(3, 10, device=DEVICE), torch.zeros(3, 3, device=DEVICE), 0.0, None))


def rows_with(bad, tasks=3, width=1000, dtype=torch.float32):
    rows = torch.randn(tasks, width).to(dtype)
    rows[1, [0, 700, width - 1]] = bad
    return rows.to(DEVICE)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("tasks", "dtype"), [(3, torch.float32), (3, torch.bfloat16), (17, torch.float32)])
def test_a_value_that_is_not_finite_stays_in_its_row_and_column(bad, tasks, dtype):
    rows = rows_with(bad, tasks, dtype=dtype)
    clean = rows.clone()
    clean[1] = 1
    kept = [t for t in range(tasks) if t != 1]
    found, without = cuda.gram(rows, None), cuda.gram(clean, None)
    assert torch.equal(found[kept][:, kept], without[kept][:, kept])
    assert not found[1].isfinite().any() and not found[:, 1].isfinite().any()

    weights = torch.ones(tasks, dtype=torch.float64, device=DEVICE)
    weights[1] = 0
    out = torch.empty(1000, dtype=dtype, device=DEVICE)
    cuda.combine(rows, weights, None, out)
    assert (~out.isfinite()).nonzero().flatten().tolist() == [0, 700, 999]


@pytest.mark.parametrize("launches", LAUNCHES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_task_reaches_the_merged_gradient_and_does_not_spoil_the_rest(bad, launches, monkeypatch):
    monkeypatch.setattr(cuda, "launches", launches)
    rows, order = rows_with(bad, 4), torch.stack([torch.randperm(4) for _ in range(4)])
    out = torch.empty(1000, device=DEVICE)
    cuda.pcgrad(rows, order.to(DEVICE), Guards(), 1.0, None, out)
    assert (~out.isfinite()).nonzero().flatten().tolist() == [0, 700, 999]


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("launches", LAUNCHES)
@pytest.mark.parametrize("tasks", [3, 11])
def test_out_may_be_a_row(row, launches, tasks, monkeypatch):
    monkeypatch.setattr(cuda, "launches", launches)
    rows = torch.randn(tasks, 5000, device=DEVICE)
    order = torch.stack([torch.randperm(tasks) for _ in range(tasks)]).to(DEVICE)
    apart = torch.empty(5000, device=DEVICE)
    cuda.pcgrad(rows, order, Guards(), 1.0, None, apart)
    before = rows.clone()
    cuda.pcgrad(rows, order, Guards(), 1.0, None, rows[row])
    kept = [t for t in range(tasks) if t != row]
    assert torch.equal(rows[row], apart) and torch.equal(rows[kept], before[kept])


@pytest.mark.parametrize("tasks", [3, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_columns_bits_do_not_depend_on_where_it_lies(tasks, dtype):
    rows = torch.randn(tasks, 3000).to(dtype).to(DEVICE)
    weights = torch.randn(tasks, dtype=torch.float64).to(DEVICE)
    matrix = torch.randn(tasks, tasks, dtype=torch.float64).to(DEVICE)
    whole, mixed = torch.empty(3000, dtype=dtype, device=DEVICE), rows.clone()
    cuda.combine(rows, weights, None, whole)
    cuda.mix_(mixed, matrix, None)
    for start, end in ((1, 3000), (512, 1024), (700, 703)):
        part, part_mixed = torch.empty(end - start, dtype=dtype, device=DEVICE), rows[:, start:end].clone()
        cuda.combine(rows[:, start:end], weights, None, part)
        cuda.mix_(part_mixed, matrix, None)
        assert torch.equal(part, whole[start:end]) and torch.equal(part_mixed, mixed[:, start:end])


@pytest.mark.parametrize("tasks", [3, 17])
@pytest.mark.parametrize("scale", [1e-36, 1e34])
def test_weights_that_fp32_cannot_hold(tasks, scale):
    rows = torch.randn(tasks, 1300)
    weights, matrix = torch.randn(tasks, dtype=torch.float64), torch.randn(tasks, tasks, dtype=torch.float64)
    rows[0] /= scale
    weights[0] *= scale
    matrix[:, 0] *= scale
    out, mixed = torch.empty(1300, device=DEVICE), rows.to(DEVICE)
    cuda.combine(mixed, weights.to(DEVICE), None, out)
    assert cases.error(out.cpu(), rows, weights) <= 1e-6
    mixed = mixed.clone()
    cuda.mix_(mixed, matrix.to(DEVICE), None)
    assert cases.error(mixed.cpu(), rows, matrix) <= 1e-6


@pytest.mark.parametrize("tasks", [3, 17])
@pytest.mark.parametrize(("size", "scale"), [(1e-42, 1e36), (1e39, 1e-36)], ids=["a few bits", "infinite"])
def test_weights_that_are_no_fp32_numbers(tasks, size, scale):
    rows = scale * torch.randn(tasks, 1300)
    weights, out = size * torch.randn(tasks, dtype=torch.float64), torch.empty(1300, device=DEVICE)
    cuda.combine(rows.to(DEVICE), weights.to(DEVICE), None, out)
    assert cases.error(out.cpu(), rows, weights) <= 1e-6


@pytest.mark.parametrize("tasks", [2, 8, 17])
def test_one_row_out_of_range_does_not_spoil_the_others(tasks):
    rows = torch.randn(tasks, 3000)
    rows *= torch.logspace(-38, 30, tasks)[:, None]
    exact, found = reference.gram(rows), cuda.gram(rows.to(DEVICE), None).cpu()
    norms = exact.diagonal().sqrt()
    assert bool(((found - exact).abs() <= 1e-6 * norms[:, None] * norms).all())


@pytest.mark.parametrize("tasks", [3, 17])
@pytest.mark.parametrize("scale", cases.SUBNORMAL_SQUARES)
def test_gram_holds_what_fp32_squares_hold_but_in_part(tasks, scale):
    rows = cases.rows_of_one_size(tasks, 2000, scale)
    for sizes in (1.0, 1 / scale):
        rows[1] *= sizes
        exact, found = reference.gram(rows), cuda.gram(rows.to(DEVICE), None).cpu()
        norms = exact.diagonal().sqrt()
        assert bool(((found - exact).abs() <= 1e-6 * norms[:, None] * norms).all())


@pytest.mark.parametrize(("tasks", "count"), [(4, 20_000), (8, 20_000), (16, 20_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_few_large_numbers_do_not_hide_many_small_ones(tasks, count, dtype):
    rows = torch.rand(tasks, count).to(dtype)
    rows[:, ::4096] = 1000
    exact, found = reference.gram(rows), cuda.gram(rows.to(DEVICE), None).cpu()
    norms = exact.diagonal().sqrt()
    assert bool(((found - exact).abs() <= 1e-6 * norms[:, None] * norms).all())


def test_a_lane_is_flushed_before_it_loses_what_is_small():
    """Six slots of 32 steps; each lane meets one large product, then small ones of a quarter of its last place.

    127 of them lost would be 1.9e-6 of the sum; of the 31 that follow before the flush, 4.6e-7 at most.
    """
    step, steps, slots = 1024, 32, 6
    row = torch.full((slots * steps * step,), 0.5)
    row.view(slots, steps * step)[:, :step:4] = 4096.0
    rows = row.expand(8, -1).contiguous()
    exact = float(reference.gram(rows[:1]))
    assert float((cuda.gram(rows.to(DEVICE), None) / exact - 1).abs().max()) <= 1e-6


@pytest.mark.parametrize("tasks", [2, 5, 12])
@pytest.mark.parametrize("segmented", [False, True])
def test_bits_do_not_depend_on_the_multiprocessors(library, tasks, segmented, monkeypatch):
    if library is None:
        pytest.skip("a GPU has as many multiprocessors as it has")
    monkeypatch.setattr(cuda, "launches", cuda.ONE_LAUNCH)
    rows = torch.randn(tasks, 30_000)
    segments = torch.tensor([0, 10, 10, 12_345, 30_000]) if segmented else None
    order = torch.stack([torch.randperm(tasks) for _ in range(tasks)])
    results = []
    for multiprocessors in (1, 2, 5):
        library.emulated_multiprocessors(multiprocessors)
        out = torch.empty(30_000)
        results.append((out, *cuda.pcgrad(rows, order, Guards(), 1.0, segments, out)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tasks", [2, 8, 16, 24, 40, 70])
def test_a_device_with_less_shared_memory(library, tasks, dtype, monkeypatch):
    """GeForce RTX 30 and 40 have 99 KiB for a block, an A100 163; a Hopper GPU has 227."""
    if library is None:
        pytest.skip("a GPU has the shared memory that it has")
    library.emulated_shared_memory(99)
    case = cases.Case(tasks, 600 if tasks == 70 else 1300, dtype)  # several tiles of columns
    test_gram(case)
    test_mix(case)
    if GPU or tasks < 70 or dtype == torch.float32:  # the projections of 70 tasks take fibers a second
        test_pcgrad_is_the_same_in_one_launch_and_in_several(case, monkeypatch)


@pytest.mark.parametrize("kilobytes", [99, 227])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tasks", [192, 193, 256])
def test_mix_takes_any_number_of_tasks_on_any_device(library, tasks, dtype, kilobytes):
    if library is not None:
        library.emulated_shared_memory(kilobytes)
    elif kilobytes == 99:
        pytest.skip("a GPU has the shared memory that it has")
    test_mix(cases.Case(tasks, 40, dtype))


def test_a_kernels_shared_memory_is_not_lowered_by_a_smaller_launch(library):
    """Between two calls of a thread there may be another's with fewer tasks: the emulation refuses to take it back."""
    for tasks in (256, 150, 256):
        test_mix(cases.Case(tasks, 40, torch.float64))


@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("tasks", [3, 20])
@pytest.mark.parametrize("launches", LAUNCHES)
def test_a_green_context_has_a_part_of_the_device(library, tasks, launches, multiprocessors, monkeypatch):
    """A launch whose blocks wait for each other is refused there; fewer of them give the same bits."""
    if library is None:
        pytest.skip("the emulation's green context is not a GPU's: tests/gpu has that")
    monkeypatch.setattr(cuda, "launches", launches)
    library.emulated_multiprocessors(7)
    rows, order = torch.randn(tasks, 9000), torch.rand(tasks, tasks).argsort(dim=-1)
    rows[1] *= 2.0**90  # read again by all blocks, in float64

    def surgery():
        out = torch.empty(9000)
        return out, *cuda.pcgrad(rows, order, Guards(), 1.0, None, out)

    expected = surgery()
    library.emulated_green_context(multiprocessors)
    assert all(torch.equal(a, b) for a, b in zip(surgery(), expected, strict=True))


@pytest.mark.parametrize("segments", [2**31, 2**32 + 1])
def test_more_blocks_than_a_grid_has_are_refused(library, segments):
    """The runtime would take the lower half of their number, and launch so few."""
    if library is None:
        pytest.skip("a GPU would read so many offsets")
    rows = (None, 2, 10, 10, 0, None, segments)
    for status in (library.fpg_cuda_combine(*rows, *[None] * 3), library.fpg_cuda_gram(*rows, *[None] * 3)):
        assert library.fpg_cuda_error(status) == b"invalid configuration argument"


GUARDS = [(False, 0.0, 0.0), (True, 0.0, 0.0), (True, 1e-8, 0.0), (False, 0.0, 4.0)]


@pytest.mark.parametrize("guards", GUARDS, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 8, 33])
def test_coefficients(tasks, guards):
    problems = 3 if tasks < 33 else 1  # more than a warp has lanes; fibers take half a second for each
    rows = torch.randn(problems, tasks, 5, dtype=torch.float64)
    grams, orders = rows @ rows.mT, torch.rand(problems, tasks, tasks).argsort(dim=-1)
    for order in (orders, orders[0]):
        found = cuda.pcgrad_coefficients(grams.to(DEVICE), order.to(DEVICE), Guards(*guards)).cpu()
        for s in range(problems):
            expected = reference.coefficients(grams[s], order if order.dim() == 2 else order[s], *guards)
            torch.testing.assert_close(found[s], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("entry", [-1, 4, 2**40])
def test_an_order_entry_out_of_range_poisons_its_row_alone(entry):
    rows = torch.randn(4, 40, dtype=torch.float64)
    gram, order = (rows @ rows.mT).to(DEVICE), torch.stack([torch.randperm(4) for _ in range(4)]).to(DEVICE)
    expected = cuda.pcgrad_coefficients(gram, order, Guards())
    order[2, 1] = entry
    found = cuda.pcgrad_coefficients(gram, order, Guards())
    assert found[2].isnan().all() and torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


def test_more_tasks_than_the_kernels_take_go_to_the_eager_backend():
    most = cuda.LARGEST_TASKS
    assert backends.for_tasks(cuda, most) is cuda and backends.for_tasks(cuda, most + 1) is eager


@pytest.mark.parametrize("offsets", [[5, -3, 2000, 7], [0, 0, 0, 0], [900, 10, 20, 10**12]])
def test_offsets_that_are_wrong_touch_nothing_outside(offsets):
    """Offsets on a GPU cannot be validated without a sync: the result may be wrong, the memory may not."""
    storage = torch.full((4 * 1000,), torch.nan, device=DEVICE)
    rows, segments = storage[1000:3000].view(2, 1000), torch.tensor(offsets, device=DEVICE)
    rows.fill_(1.0)
    cuda.mix_(rows, torch.eye(2, dtype=torch.float64, device=DEVICE).repeat(3, 1, 1), segments)
    cuda.gram(rows, segments)
    assert storage[:1000].isnan().all() and storage[3000:].isnan().all() and bool((rows == 1).all())


def test_an_error_of_a_launch_is_an_exception_with_its_text(library, monkeypatch):
    if library is None:
        pytest.skip("the emulated stream that fails is not a GPU's")
    monkeypatch.setattr(cuda, "_stream", lambda device: 2**64 - 1)
    with pytest.raises(RuntimeError, match="fpg_cuda_gram: invalid resource handle"):
        cuda.gram(torch.randn(2, 10), None)


@pytest.mark.parametrize("current", [0, 1])
def test_work_is_queued_on_the_current_stream_of_the_tensors_device(current, monkeypatch):
    """The library launches on the current device, which is as before when the call is over."""
    devices, calls = [current], []

    @contextmanager
    def switched(index):
        devices.append(index)
        yield
        devices.pop()

    def probe(stream):
        calls.append((devices[-1], stream))
        return 0

    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(cuda, "raw_stream", lambda index: 100 + index)
    monkeypatch.setattr(cuda, "_library", SimpleNamespace(fpg_cuda_probe=probe))
    for device in ("cuda:1", "cuda:0", "cuda"):
        cuda._call("fpg_cuda_probe", torch.device(device))
    assert calls == [(1, 101), (0, 100), (current, 100 + current)] and devices == [current]


def test_what_the_library_refuses_is_a_value_error():
    rows = torch.randn(2, 10, device=DEVICE)
    with pytest.raises(ValueError, match="fpg_cuda_combine: bad argument"):
        cuda._call("fpg_cuda_combine", rows.device, rows.data_ptr(), 0, 10, 10, 0, None, 1, None, None)
