"""What goes from the host to a GPU within a call waits for nothing: from page-locked memory, without blocking.

Without a GPU: fake tensors have a device that is not there, and a mode sees the copies that a call asks for.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad._ops import to_device
from fastpcgrad.methods._task_vector import Preference

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _no_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


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


def test_a_capture_waits_and_so_refuses(monkeypatch):
    """A graph would read the memory at each replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with Copies() as copies:
        to_device(torch.arange(3), CUDA)
    assert copies.seen == [(False, False)]


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
