"""Orders that lie in the host's memory: of few tasks they travel with the launch, and nothing is copied."""

from __future__ import annotations

import pytest
import torch

import fastpcgrad
from fastpcgrad import _ops, backends
from fastpcgrad.backends import cuda, eager, kernels
from fastpcgrad.variants import Guards
from tests.backends.cuda_emulated import CXX, DEVICE, GPU
from tests.backends.test_cuda_blocks import Scattered, random_order

pytestmark = [
    pytest.mark.skipif(not (GPU or CXX), reason="needs a GPU with the CUDA library, or a C++ compiler"),
    pytest.mark.usefixtures("poisoned_memory", "library"),
]
TASKS = [1, 2, 3, 8, 9, 16, 17]


@pytest.fixture(params=[cuda.ONE_LAUNCH, cuda.SEVERAL_LAUNCHES])
def launches(request, monkeypatch):
    monkeypatch.setattr(cuda, "launches", request.param)


@pytest.fixture
def brought(monkeypatch):
    """The shapes of orders that were copied to the device."""
    shapes, to_device = [], _ops.to_device

    def noted(tensor, device, constant=False):
        shapes.append(tuple(tensor.shape))
        return to_device(tensor, device, constant)

    monkeypatch.setattr(_ops, "to_device", noted)
    return shapes


@pytest.fixture
def on_host(monkeypatch):
    """Where the device is emulated, any order is one of the host's."""

    def begin():
        if not GPU:
            monkeypatch.setattr(cuda, "_is_on_host", lambda order, device: True)

    return begin


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("segments", [None, [0, 3, 3, 900]], ids=["whole", "segments"])
@pytest.mark.parametrize("tasks", TASKS)
def test_the_bits_are_those_of_an_order_on_the_device(tasks, segments, on_host, brought):
    rows, order = torch.randn(tasks, 900, device=DEVICE), random_order(tasks)
    segments = None if segments is None else torch.tensor(segments, device=DEVICE)

    def surgery(order):
        out, mixed = rows.new_empty(900), rows.clone()
        found = cuda.pcgrad(rows, order, Guards(self_projection=True), 0.5, segments, out)
        return [out, mixed, *found, *cuda.pcgrad_(mixed, order, Guards(), segments)]

    expected = surgery(order)
    assert not brought
    on_host()
    assert all(map(torch.equal, surgery(order.cpu()), expected))
    assert brought == ([] if tasks <= 16 else [(tasks, tasks)] * 2)


@pytest.mark.parametrize("tasks", TASKS)
def test_blocks_and_coefficients_take_them_as_well(tasks, on_host, brought):
    problem, order = Scattered(tasks, torch.float32, seed=tasks), random_order(tasks)

    def surgery(order):
        out = problem.fresh()
        figures = cuda.pcgrad_blocks(problem.blocks, order, Guards(), 1.0, out)()
        grams = torch.stack([figures.gram, 2 * figures.gram.mT])
        return [
            *figures[:3],
            *filter(lambda place: place is not None, out),
            cuda.pcgrad_coefficients(grams, order, Guards(eps=0.5)),
        ]

    expected = surgery(order)
    on_host()
    assert all(map(torch.equal, surgery(order.cpu()), expected))
    assert len(brought) == (0 if tasks <= 16 else 2)


def test_an_order_for_each_problem_is_brought(on_host, brought):
    rows, segments = torch.randn(3, 50, device=DEVICE), torch.tensor([0, 20, 50], device=DEVICE)
    orders = torch.stack([random_order(3), random_order(3)])
    expected, found = rows.new_empty(50), rows.new_empty(50)
    cuda.pcgrad(rows, orders, Guards(), 1.0, segments, expected)
    on_host()
    cuda.pcgrad(rows, orders.cpu(), Guards(), 1.0, segments, found)
    assert torch.equal(found, expected) and brought == [(2, 3, 3)]


@pytest.mark.parametrize("entry", [-1, 4, 255, 256, 258, 2**40])
@pytest.mark.parametrize("tasks", [4, 16])
def test_an_entry_out_of_range_poisons_its_row_alone(entry, tasks, on_host):
    rows = torch.randn(tasks, 40, dtype=torch.float64)
    gram, order = (rows @ rows.mT).to(DEVICE), random_order(tasks)
    expected = cuda.pcgrad_coefficients(gram, order, Guards())
    on_host()
    order = order.cpu()
    order[2, 1] = entry if entry != 4 else tasks
    found = cuda.pcgrad_coefficients(gram, order, Guards())
    kept = [t for t in range(tasks) if t != 2]
    assert found[2].isnan().all() and torch.equal(found[kept], expected[kept])


def test_the_library_refuses_one_of_more_tasks(monkeypatch, on_host):
    on_host()
    monkeypatch.setattr(cuda, "_LARGEST_GIVEN", 17)
    gram = torch.eye(17, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="fpg_cuda_pcgrad_coefficients: bad argument"):
        cuda.pcgrad_coefficients(gram, random_order(17).cpu(), Guards())


@pytest.mark.parametrize("tasks", [2, 8, 17])
@pytest.mark.parametrize("variant", ["paper", "pytorch-pcgrad", "tensorflow", "libmtl"])
def test_what_is_drawn_is_the_order_of_the_call(tasks, variant, on_host, monkeypatch):
    monkeypatch.setattr(cuda, "why_unavailable", lambda device_type: None)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "cuda")
    chosen = fastpcgrad.variants.get(variant)
    rows = torch.randn(tasks, 300, device=DEVICE)
    drawn = chosen.draw_orders(tasks, None, torch.Generator().manual_seed(3)).to(DEVICE)
    expected = fastpcgrad.pcgrad(rows, variant=variant, order=drawn)
    on_host()
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(fastpcgrad.pcgrad(rows, variant=variant, generator=generator), expected)


def test_those_who_do_not_take_them_bring_them(brought):
    gram, variant = torch.eye(3, dtype=torch.float64, device="meta"), fastpcgrad.variants.get("paper")
    order = kernels.orders(variant, 3, None, None, gram.device)
    assert order.is_cpu and eager.pcgrad_coefficients(gram, order, Guards()).is_meta
    assert brought == [(3, 3)]
