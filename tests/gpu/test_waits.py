"""Calls on packed rows queue their work and return: torch's debug mode does not see what the driver waits for."""

from __future__ import annotations

import threading

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, variants
from fastpcgrad._ops import to_device
from fastpcgrad.backends import cuda
from tests.gpu.waiting import behind, no_waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("nbytes", [8, 1 << 15, 1 << 16, (1 << 16) + 8, 1 << 20])
def test_what_the_host_brings(nbytes):
    given = torch.randn(nbytes // 8, dtype=torch.float64)
    expected = given.clone()
    to_device(given, DEVICE)  # the allocators' first memory waits
    with behind(), no_waiting():
        found = to_device(given, DEVICE)
        given.zero_()
        others = [to_device(given, DEVICE) for _ in range(3)]  # must not get the memory that is still to be read
    assert torch.equal(found.cpu(), expected) and not any(bool(other.any()) for other in others)


@pytest.mark.parametrize("tasks", [2, 16, 64, 91, 200])
@pytest.mark.parametrize("segments", [None, [0, 7, 7, 3001]], ids=["whole", "segments"])
def test_a_surgery_that_draws_its_order(tasks, segments, monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "cuda")
    J = torch.randn(tasks, 3001, device=DEVICE)
    fastpcgrad.pcgrad(J, segments=segments)
    with behind(), no_waiting():
        fastpcgrad.pcgrad(J, segments=segments)
        fastpcgrad.pcgrad_(J, segments=segments)


@pytest.mark.parametrize(
    "method",
    [
        methods.Constant([0.25] * 4),
        methods.RandomWeights(torch.Generator()),
        methods.UPGrad(torch.linspace(0.5, 2.0, 4)),
        methods.GradVac(generator=torch.Generator()),
    ],
    ids=lambda method: type(method).__name__,
)
def test_weights_of_methods(method, monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "cuda")
    J = torch.randn(4, 3001, device=DEVICE)
    method.weights(fastpcgrad.gram(J))
    with behind(), no_waiting():
        method.weights(fastpcgrad.gram(J))


def test_threads_with_other_numbers_of_tasks(monkeypatch):
    """A kernel has one limit of shared memory a device, whoever launches it."""
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "cuda")
    monkeypatch.setattr(cuda, "launches", cuda.SEVERAL_LAUNCHES)
    rows = [torch.randn(tasks, 1000, device=DEVICE) for tasks in (2, 64)]
    orders = [variants.get("paper").draw_orders(len(J), None, None).to(DEVICE) for J in rows]
    expected = [fastpcgrad.pcgrad(J, order=order) for J, order in zip(rows, orders, strict=True)]
    found = [[] for _ in rows]

    def run(k):
        with torch.cuda.stream(torch.cuda.Stream()):
            found[k] += [fastpcgrad.pcgrad(rows[k], order=orders[k]) for _ in range(300)]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(rows))]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for own, right in zip(found, expected, strict=True):
        assert len(own) == 300 and all(torch.equal(each, right) for each in own)
