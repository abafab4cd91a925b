"""Rows in host memory, filled by copies that come late."""

from contextlib import contextmanager
from mmap import PAGESIZE

import pytest
import torch

from fastpcgrad.rows import host as host_rows
from fastpcgrad.rows.host import CudaCopies, HostRows, copies_for, row_width
from tests.late_copies import LateCopies
from tests.linear_problems import KINDS, Kind

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


def rows_of(kinds, dtype=torch.float32):
    """Rows for parameters of these kinds, and gradients as autograd lays them out."""
    parameters = [kind.parameter(torch.float32) for kind in kinds]
    grads = [torch.randn_like(torch.empty_like(p, requires_grad=False)) for p in parameters]
    copies = LateCopies()
    return HostRows(parameters, [g.stride() for g in grads], dtype, copies), copies, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_tasks_are_in_their_places_after_the_wait(dtype):
    rows, _, grads = rows_of(KINDS, dtype)
    places = [[rows.copy(task, index, g * (task + 1)) for index, g in enumerate(grads)] for task in range(3)]
    rows.wait()
    for task, row in enumerate(places):
        for place, g in zip(row, grads, strict=True):
            assert place.stride() == g.stride() and place.dtype == dtype
            assert torch.equal(place, (g * (task + 1)).to(dtype))


def test_gradients_with_other_strides_take_those_of_the_place():
    rows, _, _ = rows_of([Kind((4, 3)), Kind((6,))])
    grads = [torch.randn(3, 4).t(), torch.ones(1).expand(6)]
    places = [rows.copy(0, index, g) for index, g in enumerate(grads)]
    rows.wait()
    assert all(torch.equal(place, g) for place, g in zip(places, grads, strict=True))


def test_a_row_is_one_piece_that_is_locked_once_and_only_for_tasks_that_come():
    rows, copies, grads = rows_of([Kind((7,)), Kind((33,))])
    for task in (2, 2, 5):
        for index, g in enumerate(grads):
            rows.copy(task, index, g)
    rows.wait()
    assert copies.locked == [PAGESIZE] * 2
    first, second = (rows.copy(2, index, g) for index, g in enumerate(grads))
    assert first.data_ptr() % PAGESIZE == 0 and second.data_ptr() - first.data_ptr() == 64


def test_no_elements_need_no_lock():
    rows, copies, (grad,) = rows_of([Kind((0,))])
    rows.copy(0, 0, grad)
    assert copies.locked == []


def test_further_gradients_are_added_in_the_rows_dtype():
    rows, _, (g,) = rows_of([Kind((5, 3), "transposed")], torch.bfloat16)
    place = rows.copy(0, 0, g)
    rows.add(place, g)
    rows.add(place, g * 3)
    rows.wait()
    narrow = g.bfloat16()
    assert torch.equal(place, narrow + narrow + (g * 3).bfloat16())


def test_an_addition_of_a_row_that_was_given_up_does_not_reach_the_next():
    rows, _, (g,) = rows_of([Kind((4,))])
    rows.add(rows.copy(0, 0, g), g)
    place = rows.copy(0, 0, g * 2)
    rows.wait()
    assert torch.equal(place, g * 2)


def test_fetching_sees_what_was_copied_and_added():
    rows, _, (g,) = rows_of([Kind((4,))])
    place = rows.copy(0, 0, g)
    assert torch.equal(rows.fetch(place), g)
    rows.add(place, g)
    assert torch.equal(rows.fetch(place), g + g)


def test_after_a_join_the_gradients_may_be_overwritten():
    rows, _, (g,) = rows_of([Kind((4,))])
    expected = g.clone()
    place = rows.copy(0, 0, g)
    rows.join()
    g.fill_(torch.nan)
    rows.wait()
    assert torch.equal(place, expected)


def test_no_more_than_the_limit_is_on_its_way(monkeypatch):
    monkeypatch.setattr(host_rows, "IN_FLIGHT", 100)
    rows, copies, grads = rows_of([Kind((10,))] * 6)
    for index, g in enumerate(grads):
        place = rows.copy(0, index, g)
        assert sum(source.nbytes for source, _ in copies.waiting) <= 100
    assert copies.waiting and not torch.equal(place, grads[-1])


@pytest.mark.parametrize(("device", "row_device"), [(CPU, None), (CPU, "cpu"), (CUDA, None), (CUDA, "cuda:1")])
def test_rows_that_lie_where_the_parameters_are_need_no_copies(device, row_device):
    assert copies_for(device, row_device) is None


def test_a_device_without_an_index_is_the_parameters_own():
    assert copies_for(CUDA, torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("device", "row_device"),
    [(CPU, "cuda"), (CPU, "meta"), (CUDA, "cuda:0"), (torch.device("meta"), "cpu"), (CPU, "nowhere"), (CPU, 2.5)],
)
def test_other_devices_are_refused(device, row_device):
    with pytest.raises(ValueError, match="row_device") as caught:
        copies_for(device, row_device)
    assert str(row_device) in str(caught.value)


def test_parameters_on_a_gpu_may_have_their_rows_on_the_host(monkeypatch):
    monkeypatch.setattr(CudaCopies, "__init__", lambda self, device: None)
    assert isinstance(copies_for(CUDA, "cpu"), CudaCopies)


class RecordedCuda:
    """Stands in for ``torch.cuda``: writes down who waits for whom."""

    def __init__(self):
        self.calls = []

    def Stream(self, device):
        return RecordedStream(self.calls, "side")

    def current_stream(self, device):
        return RecordedStream(self.calls, "current")

    @contextmanager
    def stream(self, stream):
        self.calls.append(f"on {stream.name}")
        yield
        self.calls.append("on current")

    def cudart(self):
        return self

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls.append(("lock", address, nbytes))
        return 0

    def cudaHostUnregister(self, address):
        self.calls.append(("unlock", address))
        return 0

    def check_error(self, result):
        assert result == 0


class RecordedStream:
    def __init__(self, calls, name):
        self.calls, self.name = calls, name

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.calls.append(f"event of {self.name}")
        return self

    def synchronize(self):
        self.calls.append(f"the host waits for {self.name}")


@pytest.fixture
def recorded(monkeypatch):
    cuda = RecordedCuda()
    for name in ("Stream", "current_stream", "stream", "cudart", "check_error"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: cuda.calls.append(f"used on {stream.name}"))
    return cuda.calls


def test_a_copy_to_the_host_waits_for_the_gradient_and_keeps_its_memory(recorded):
    source, target = torch.randn(3, 2), torch.zeros(3, 2)
    event = CudaCopies(CPU).to_host(source, target)
    assert torch.equal(target, source)
    assert recorded == ["side waits for current", "on side", "event of side", "on current", "used on side"]
    event.synchronize()
    assert recorded[-1] == "the host waits for side"


def test_a_copy_to_the_device_comes_after_earlier_copies_and_before_later_ones(recorded):
    source = torch.randn(2, 3).t()
    found = CudaCopies(CPU).to_device(source)
    assert torch.equal(found, source) and found.stride() == source.stride()
    assert recorded == ["current waits for side", "side waits for current"]


def test_the_computation_waits_for_the_copies_where_it_is_told_to(recorded):
    parameter, copies = torch.zeros(3), CudaCopies(CPU)
    HostRows([parameter], [(1,)], torch.float32, copies).join()
    assert recorded == ["current waits for side"]


def test_memory_is_locked_for_as_long_as_it_lives(recorded):
    memory = torch.zeros(100)
    address = memory.data_ptr()
    CudaCopies(CPU).lock(memory)
    assert recorded == [("lock", address, 400)]
    del memory
    assert recorded[1:] == ["the host waits for side", ("unlock", address)]


def test_a_row_from_elsewhere_is_not_written_while_the_device_reads_its_place():
    rows, copies, (g,) = rows_of([Kind((4,))])
    rows.fetch(rows.copy(0, 0, g))
    assert copies.read
    (place,) = rows.place(0, [g * 2])
    assert not copies.read and torch.equal(place, g * 2)


def test_the_host_waits_for_copies_in_both_directions(recorded):
    CudaCopies(CPU).settle()
    assert recorded == ["the host waits for side"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_blocks_begin_at_multiples_of_64_bytes(dtype):
    for width in (0, 1, 7, 8, 16, 33):
        assert width <= row_width(width, dtype) < width + 64
        assert row_width(width, dtype) * dtype.itemsize % 64 == 0
