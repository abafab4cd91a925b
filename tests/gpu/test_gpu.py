"""What only a GPU can show: sizes beyond 2³¹, CUDA graphs, streams, determinism."""

from __future__ import annotations

from array import array

import pytest
import torch

import fastpcgrad
from fastpcgrad import backends, reference
from fastpcgrad._blocks import Blocks
from fastpcgrad.backends import cuda, kernels
from fastpcgrad.variants import Guards
from tests.gpu.waiting import no_waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request, monkeypatch):
    """Both backends, forced: on a machine with a GPU a missing one is an error."""
    reason = backends.why_unavailable(request.param, "cuda")
    assert reason is None, reason
    monkeypatch.setenv("FASTPCGRAD_BACKEND", request.param)
    return request.param


def random_order(tasks):
    return torch.stack([torch.randperm(tasks) for _ in range(tasks)]).to(DEVICE)


def error(found, rows, weights):
    """‖m − m₆₄‖ / Σ_j |w_j| ‖g_j‖, in float64 on the GPU, block by block of columns."""
    squared, norms = torch.zeros((), dtype=torch.float64, device=DEVICE), torch.zeros(len(rows), dtype=torch.float64)
    norms = norms.to(DEVICE)
    for a in range(0, rows.shape[1], 1 << 22):
        block = rows[:, a : a + (1 << 22)].double()
        squared += (found[a : a + (1 << 22)].double() - weights @ block).square().sum()
        norms += block.square().sum(dim=1)
    return float(squared.sqrt() / (weights.abs() @ norms.sqrt()))


def exact_gram(rows):
    """In float64, few columns at a time: sums of a million products are off by more than what is compared with them."""
    exact = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=DEVICE)
    for block in rows.split(1 << 13, dim=1):
        exact += block.double() @ block.double().mT
    return exact


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tasks", [2, 4, 8, 16, 24, 32, 33, 64, 65, 70])
@pytest.mark.parametrize("width", [10_000, 3_000_017])
def test_the_whole_surgery_is_the_oracles(tasks, width, dtype):
    rows, order = torch.randn(tasks, width, device=DEVICE).to(dtype), random_order(tasks)
    exact = exact_gram(rows)
    coefficients = reference.coefficients(exact.cpu(), order.cpu()).to(DEVICE)
    merged = fastpcgrad.pcgrad(rows, order=order, reduction="sum")
    assert error(merged, rows, coefficients.sum(dim=0)) <= TOLERANCE[dtype]
    mixed = fastpcgrad.pcgrad_(rows.clone(), order=order)
    for i in (0, tasks - 1):
        assert error(mixed[i], rows, coefficients[i]) <= TOLERANCE[dtype]
    norms = exact.diagonal().sqrt()
    found = fastpcgrad.gram(rows)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert bool(((found - exact).abs() <= tolerance * norms[:, None] * norms).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_two_to_the_31_elements(dtype):
    tasks, width = 3, 3 * 2**28 + 12_345
    rows = torch.empty(tasks, width, dtype=dtype, device=DEVICE)
    for a in range(0, width, 1 << 26):
        rows[:, a : a + (1 << 26)].normal_()
    rows[1, 0] = rows[1, -1] = 3.0
    weights = torch.randn(tasks, dtype=torch.float64).to(DEVICE)
    assert error(fastpcgrad.combine(rows, weights), rows, weights) <= TOLERANCE[dtype]
    gram, diagonal = fastpcgrad.gram(rows), torch.zeros(tasks, dtype=torch.float64, device=DEVICE)
    for a in range(0, width, 1 << 24):
        diagonal += rows[:, a : a + (1 << 24)].double().square().sum(dim=1)
    torch.testing.assert_close(gram.diagonal(), diagonal, rtol=1e-6, atol=0)
    last = rows[:, -5:].clone()
    matrix = torch.randn(tasks, tasks, dtype=torch.float64).to(DEVICE)
    fastpcgrad.mix_(rows, matrix)
    torch.testing.assert_close(rows[:, -5:].double(), matrix @ last.double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("tasks", "dtype"), [(2, torch.float32), (8, torch.float32), (16, torch.bfloat16), (40, torch.float32)]
)
def test_same_bits_every_time(tasks, dtype):
    rows, order = torch.randn(tasks, 5_000_003, device=DEVICE).to(dtype), random_order(tasks)
    runs = [(fastpcgrad.gram(rows), fastpcgrad.pcgrad(rows, order=order)) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("launches", [cuda.ONE_LAUNCH, cuda.SEVERAL_LAUNCHES])
@pytest.mark.parametrize("tasks", [4, 20])
def test_a_captured_surgery_replays_with_another_order(tasks, launches, monkeypatch):
    monkeypatch.setattr(cuda, "launches", launches)
    rows, order = torch.randn(tasks, 100_003, device=DEVICE), random_order(tasks)
    fastpcgrad.pcgrad(rows, order=order)  # compiles, and loads what is loaded at first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged = fastpcgrad.pcgrad(rows, order=order)
    for _ in range(3):
        rows.copy_(torch.randn(tasks, 100_003))
        order.copy_(random_order(tasks))
        graph.replay()
        assert torch.equal(merged, fastpcgrad.pcgrad(rows, order=order))


WIDTHS = [50_257 * 16, *[16 * 64 * 9, 64, 1, 16 * 1024 + 3, 7] * 40, 2**22 + 1]
"""Of parameters, large and tiny, most of them of no round size."""


def in_blocks(tasks, dtype, widths=WIDTHS):
    """Gradients of parameters, a fifth of them absent, and the same as J with zeros."""
    dense = [[torch.randn(width, device=DEVICE).to(dtype) for width in widths] for _ in range(tasks)]
    tensors = [[None if (t + b) % 5 == 0 else grad for b, grad in enumerate(row)] for t, row in enumerate(dense)]
    return blocks_of(tensors, widths), torch.stack([joined(row, widths, dtype) for row in tensors])


def blocks_of(tensors, widths):
    pointers = [[0 if grad is None else grad.data_ptr() for grad in row] for row in tensors]
    dtype = next(grad.dtype for row in tensors for grad in row if grad is not None)
    return Blocks(tensors, pointers, array("q", widths), dtype, torch.device(DEVICE))


def joined(row, widths, dtype):
    zeros = [torch.zeros(width, dtype=dtype, device=DEVICE) for width in widths]
    return torch.cat([zero if grad is None else grad for grad, zero in zip(row, zeros, strict=True)])


def merged_to(blocks):
    """Fresh memory for each block that a task has."""
    columns = zip(*blocks.tensors, strict=True)
    firsts = [next((grad for grad in column if grad is not None), None) for column in columns]
    return [None if first is None else torch.full_like(first, torch.nan) for first in firsts]


def same(some, others):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tasks", [2, 4, 8, 16, 40])
def test_gradients_where_autograd_left_them(tasks, dtype):
    blocks, rows = in_blocks(tasks, dtype)
    order, out = random_order(tasks), merged_to(blocks)
    gram, weights, *_ = kernels.pcgrad_blocks(blocks, order, Guards(), 1.0, out)()
    exact = exact_gram(rows)
    norms = exact.diagonal().sqrt()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert bool(((gram - exact).abs() <= tolerance * norms[:, None] * norms).all())
    expected = reference.coefficients(exact.cpu(), order.cpu()).to(DEVICE).sum(dim=0)
    assert error(joined(out, WIDTHS, dtype), rows, expected) <= TOLERANCE[dtype]
    again = merged_to(blocks)
    found = kernels.pcgrad_blocks(blocks, order, Guards(), 1.0, again)()
    assert same([gram, weights, *out], [found.gram, found.weights, *again])


def test_blocks_beyond_two_to_the_31_elements():
    widths = [5, 2**31 + 77, 1000]
    tensors = [[torch.empty(w, dtype=torch.bfloat16, device=DEVICE).normal_() for w in widths] for _ in range(2)]
    blocks, weights = blocks_of(tensors, widths), torch.tensor([[0.5, -2.0]], dtype=torch.float64, device=DEVICE)
    gram = kernels.gram_blocks(blocks, None, 1)[0]
    exact = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for grad in tensors[1]:
        exact += sum(part.double().square().sum() for part in grad.split(1 << 26))
    torch.testing.assert_close(gram[1, 1], exact, rtol=1e-6, atol=0)
    last = [grad[-9:].double() for grad in (tensors[0][1], tensors[1][1])]
    kernels.combine_blocks(blocks, weights, None, tensors[0])
    torch.testing.assert_close(tensors[0][1][-9:].double(), 0.5 * last[0] - 2 * last[1], rtol=2e-2, atol=2e-2)


def test_a_captured_surgery_on_blocks_replays_with_new_gradients():
    blocks, _ = in_blocks(4, torch.float32)
    order, out = random_order(4), merged_to(blocks)
    merge = kernels.pcgrad_blocks
    merge(blocks, order, Guards(), 1.0, out)  # loads what is loaded at first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge(blocks, order, Guards(), 1.0, out)
    for _ in range(3):
        for grad in (grad for row in blocks.tensors for grad in row if grad is not None):
            grad.normal_()
        order.copy_(random_order(4))
        graph.replay()
        expected = merged_to(blocks)
        merge(blocks, order, Guards(), 1.0, expected)
        assert same(out, expected)


def test_tables_of_calls_that_wait_in_the_stream_are_their_own():
    """The host runs ahead: many surgeries on other gradients are queued before the first one begins."""
    problems = [in_blocks(3, torch.float32, widths=WIDTHS[:50]) for _ in range(8)]
    expected = [kernels.gram_blocks(blocks, None, 1) for blocks, _ in problems]
    with no_waiting():
        torch.cuda._sleep(100_000_000)
        found = [kernels.gram_blocks(blocks, None, 1) for blocks, _ in problems]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_streams_do_not_disturb_each_other():
    streams = [torch.cuda.Stream() for _ in range(2)]
    rows = [torch.randn(8, 2_000_000, device=DEVICE) for _ in streams]
    order = random_order(8)
    expected = [fastpcgrad.pcgrad(each, order=order) for each in rows]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, each in zip(streams, rows, strict=True):
            with torch.cuda.stream(stream):
                found.append(fastpcgrad.pcgrad(each, order=order))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("tasks", [3, 20])
def test_a_green_context_has_a_part_of_the_gpu(tasks, backend, monkeypatch):
    if backend != "cuda":
        pytest.skip("the others' launches have no blocks that wait for each other")
    green_contexts = pytest.importorskip("torch.cuda.green_contexts", exc_type=ImportError)
    if not green_contexts.SUPPORTED:
        pytest.skip("this torch makes no green contexts")
    rows, order = torch.randn(tasks, 1_000_000, device=DEVICE), random_order(tasks)
    rows[1] *= 2.0**90  # read again by all blocks, in float64
    for launches in (cuda.ONE_LAUNCH, cuda.SEVERAL_LAUNCHES):
        monkeypatch.setattr(cuda, "launches", launches)
        expected = fastpcgrad.pcgrad(rows, order=order)
        torch.cuda.synchronize()
        context = green_contexts.GreenContext.create(num_sms=16, device_id=torch.cuda.current_device())
        context.set_context()
        try:
            found = fastpcgrad.pcgrad(rows, order=order)
            torch.cuda.synchronize()
        finally:
            context.pop_context()
        assert torch.equal(found, expected)


def test_nothing_waits_for_the_gpu():
    rows, order = torch.randn(8, 1_000_000, device=DEVICE), random_order(8)

    def both():
        fastpcgrad.pcgrad(rows, order=order)
        fastpcgrad.pcgrad_(rows, order=order)

    both()  # compiles, and loads what is loaded at first use
    with no_waiting():
        both()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_reaches_its_column_and_no_other(bad):
    rows = torch.randn(4, 3_000_001, device=DEVICE)
    columns = [0, 1_234_567, 3_000_000]
    rows[2, columns] = bad
    merged = fastpcgrad.pcgrad(rows, order=random_order(4))
    assert (~merged.isfinite()).nonzero().flatten().tolist() == columns
