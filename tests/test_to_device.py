"""What goes from the host to a GPU within a call waits for nothing: from page-locked memory, without blocking.

Without a GPU: fake tensors have a device that is not there, and a mode sees the copies that a call asks for.
"""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import fastpcgrad
from fastpcgrad import _ops, methods
from fastpcgrad._modes import is_captured
from fastpcgrad._ops import to_device
from fastpcgrad.methods import _task_vector
from fastpcgrad.methods._task_vector import Preference

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _no_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


class Copies(TorchFunctionMode):
    """Keeps of each copy to the GPU whether it is from page-locked memory and without blocking.

    ``copied`` makes the copies, by default on the CPU.
    """

    def __init__(self, copied=torch.clone):
        super().__init__()
        self.seen, self.locked, self.copied = [], [], copied

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            self.locked.append(function(*args, **kwargs))
            return self.locked[-1]
        if function is torch.Tensor.to and args[1] == CUDA:
            self.seen.append((any(args[0] is own for own in self.locked), kwargs.get("non_blocking", False)))
            return self.copied(args[0])
        return function(*args, **kwargs)


def test_a_copy_is_made_from_page_locked_memory_of_its_own():
    given = torch.arange(12).view(3, 4)
    with Copies() as copies:
        found = to_device(given, CUDA)
    assert copies.seen == [(True, True)] and torch.equal(found, given)
    assert copies.locked[0].data_ptr() != given.data_ptr()


def test_a_capture_refuses_what_is_another_at_each_call(monkeypatch):
    """A graph would read the memory at each replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with Copies() as copies, pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*order='fixed'"):
        to_device(torch.arange(3), CUDA)
    assert not copies.seen


@pytest.mark.parametrize(
    "numbers",
    [
        torch.tensor([[0, 1, -7], [2**62 + 1, 139_872_345_678_901, 2**31]]),
        torch.tensor([0.1, -1e300, 5e-324, torch.inf], dtype=torch.float64),
        torch.empty(0, 3, dtype=torch.int64),
    ],
)
def test_a_graph_keeps_what_is_constant_in_arguments_of_its_kernels(numbers, monkeypatch):
    """As it does on a GPU, but that the tensors of these kernels lie on the CPU."""
    monkeypatch.setattr(_ops, "is_captured", lambda device: True)
    with Copies() as copies:
        found = to_device(numbers, torch.device("cpu"), constant=True)
    assert not copies.seen and found.dtype == numbers.dtype and torch.equal(found, numbers)
    assert found.data_ptr() != numbers.data_ptr() or not numbers.numel()


DRAWN = [
    lambda J: fastpcgrad.pcgrad(J),
    lambda J: fastpcgrad.pcgrad_(J, variant="libmtl"),
    lambda J: methods.PCGrad("pytorch-pcgrad").weights(fastpcgrad.gram(J)),
    lambda J: methods.PCGrad().projections(3, J.device),
    lambda J: methods.RandomWeights(torch.Generator()).weights(fastpcgrad.gram(J)),
]
KEPT = [
    lambda J: fastpcgrad.pcgrad(J, variant="tensorflow"),
    lambda J: methods.PCGrad(order="fixed").weights(fastpcgrad.gram(J)),
    lambda J: methods.Constant([0.5, 0.25, 0.25]).weights(fastpcgrad.gram(J)),
    lambda J: fastpcgrad.gram(J, [0, 2, 5]),
]


@pytest.mark.parametrize(("call", "drawn"), [*((call, True) for call in DRAWN), *((call, False) for call in KEPT)])
def test_what_is_drawn_is_refused_in_a_capture_and_what_is_not_is_kept(call, drawn, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kept = []

    def kept_by_graph(tensor, device):
        kept.append(device)
        with fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    monkeypatch.setattr(_ops, "_kept_by_graph", kept_by_graph)
    with FakeTensorMode() as fake:
        J = torch.empty(3, 5, device="cuda")
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="cannot be captured") if drawn else nullcontext():
        call(J)
    assert kept == ([] if drawn else [J.device])
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_what_counts_is_the_stream_of_the_tensors_device(monkeypatch):
    """Each device has a current stream; torch tells of that of the current device."""
    current, captured = [0], {0: False, 1: True}

    @contextmanager
    def switched(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[current[-1]])
    assert not is_captured(CUDA) and not is_captured(torch.device("cuda")) and not is_captured(torch.device("cpu"))
    assert is_captured(torch.device("cuda", 1)) and current == [0]


def test_a_preference_that_a_graph_keeps_is_not_taken_by_others(monkeypatch):
    monkeypatch.setattr(_ops, "is_captured", lambda device: True)
    monkeypatch.setattr(_task_vector, "is_captured", lambda device: True)
    preference, vector = Preference(), torch.ones(3)
    preference.on(torch.device("meta"), vector, 3)
    assert not preference._copies


def test_on_the_cpu_nothing_is_copied():
    given = torch.arange(3)
    assert to_device(given, torch.device("cpu")) is given


def test_fake_tensors_have_no_memory_to_lock():
    with FakeTensorMode():
        assert to_device(torch.arange(3), CUDA).device == CUDA


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda J: fastpcgrad.pcgrad(J), 1),
        (lambda J: fastpcgrad.pcgrad(J, segments=[0, 2, 5]), 2),
        (lambda J: fastpcgrad.pcgrad_(J), 1),
        (lambda J: fastpcgrad.gram(J, segments=torch.tensor([0, 2, 5])), 1),
        (lambda J: methods.Constant([0.5, 0.25, 0.25]).weights(fastpcgrad.gram(J)), 1),
        (lambda J: methods.RandomWeights(torch.Generator()).weights(fastpcgrad.gram(J)), 1),
        (lambda J: Preference().on(J.device, torch.ones(3), 3), 1),
    ],
)
def test_calls_bring_what_they_draw_without_a_wait(call, count):
    def copied(tensor):
        with fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    with FakeTensorMode() as fake:
        J = torch.empty(3, 5, device="cuda")
    with Copies(copied) as copies:
        call(J)
    assert copies.seen == [(True, True)] * count
