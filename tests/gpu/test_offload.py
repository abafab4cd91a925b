"""Rows in host memory of parameters on a GPU: the numbers, the order of copies and computation, the memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.rows import host as host_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE, TASKS = "cuda", 4
FIXED = "tensorflow"
"""A variant that draws nothing."""
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def model_of(width=256, layers=6, dtype=SINGLE):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(DEVICE, dtype)


def batch_of(model, task, share=0):
    generator = torch.Generator().manual_seed(10 * task + share)
    width, dtype = model[0].in_features, model[0].weight.dtype
    return torch.randn(8, width, generator=generator).to(DEVICE, dtype)


def loss_of(model, task, share=0):
    """Tasks that conflict; task 1 does not touch the last layer."""
    found = (model[:-1] if task == 1 else model)(batch_of(model, task, share))
    return ((-1) ** task * found[:, task::TASKS]).sum() + found.square().mean()


def surgery_for(model, **options):
    return fastpcgrad.GradientSurgery(model.parameters(), TASKS, methods.PCGrad(FIXED), **options)


def memory_of_rows(surgery):
    """The host memory of each row that was filled."""
    return list(surgery._layouts.current.capture.rows._host._rows.values())


def run(model, surgery, shares=1):
    for share in range(shares):
        for t in (2, 0, 3, 1):
            with surgery.task(t):
                loss_of(model, t, share).backward()
    return surgery.merge()


def reference_run(shares=1, dtype=SINGLE, **options):
    """The same round with float64 rows on the GPU: the merged gradient, and the scale of its error."""
    model = model_of(dtype=dtype)
    report = run(model, surgery_for(model, row_dtype=DOUBLE, **options), shares)
    merged = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    return merged, float(report.weights.abs() @ report.norms)


def assert_merged(model, expected, tolerance):
    merged, scale = expected
    assert all(p.grad.is_cuda and p.grad.dtype == p.dtype for p in model.parameters())
    found = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    assert float((found - merged).norm()) <= tolerance * scale


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-6),
        ({"accumulate_dtype": SINGLE}, 1e-6),
        ({"accumulate": "mean"}, 1e-6),
        # For the merge of bf16 rows, and as much again each time that they are rounded.
        ({"row_dtype": HALF}, 4 * 4e-3),
        ({"row_dtype": HALF, "accumulate_dtype": SINGLE}, 4 * 4e-3),
    ],
    ids=str,
)
def test_the_merged_gradient_is_that_of_rows_on_the_gpu(shares, options, tolerance):
    model = model_of()
    surgery = surgery_for(model, row_device="cpu", **options)
    expected = reference_run(shares, accumulate=options.get("accumulate", "sum"))
    for _ in range(3):
        report = run(model, surgery, shares)
        assert not report.gram.is_cuda and report.tasks == (0, 1, 2, 3)
        assert_merged(model, expected, tolerance)


def test_rows_lie_in_page_locked_memory():
    model = model_of(64, 2)
    surgery = surgery_for(model, row_device="cpu")
    run(model, surgery)
    found = memory_of_rows(surgery)
    assert len(found) == TASKS and all(row.is_pinned() for row in found)


@pytest.mark.parametrize("limit", [0, 1 << 16, 1 << 40])
@pytest.mark.parametrize("own_stream", [False, True])
def test_copies_wait_for_gradients_and_computation_does_not_overtake_them(limit, own_stream, monkeypatch):
    """The GPU lags behind the host, and what is freed is filled with something else at once."""
    monkeypatch.setattr(host_rows, "IN_FLIGHT", limit)
    expected = reference_run()
    model = model_of()
    surgery = surgery_for(model, row_device="cpu")
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            for t in range(TASKS):
                with surgery.task(t):
                    loss = loss_of(model, t)
                    torch.cuda._sleep(20_000_000)
                    loss.backward()
                for _ in range(20):
                    torch.full((256, 256), torch.nan, device=DEVICE)
            surgery.merge()
            for _ in range(20):
                torch.full((256, 256), torch.nan, device=DEVICE)
            assert_merged(model, expected, 1e-6)


def test_an_exception_in_a_task_leaves_the_others_and_the_next_round():
    model, expected = model_of(), reference_run(2)
    surgery = surgery_for(model, row_device="cpu")
    for _ in range(3):
        for share in (0, 1, 0):
            with pytest.raises(ZeroDivisionError), surgery.task(0):
                loss_of(model, 0, share).backward()
                loss_of(model, 1, share).backward()
                raise ZeroDivisionError
        run(model, surgery, 2)
        assert_merged(model, expected, 1e-6)


@pytest.mark.parametrize("options", [{}, {"row_dtype": HALF}, {"row_dtype": HALF, "accumulate_dtype": SINGLE}], ids=str)
def test_the_gpu_holds_no_rows_and_no_more_than_the_plan_says(options, monkeypatch):
    monkeypatch.setattr(host_rows, "IN_FLIGHT", 16 << 20)
    monkeypatch.setattr("fastpcgrad.rows.memory_plan.IN_FLIGHT", 16 << 20)
    model = model_of(2048, 8)
    size = sum(p.nbytes for p in model.parameters())
    surgery = surgery_for(model, row_device="cpu", **options)
    plan = surgery.memory_plan()
    assert plan.device.rows == 0 and plan.device.free > 0
    assert plan.host.rows >= TASKS * size * (0.5 if options else 1)
    run(model, surgery)
    model.zero_grad()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(model, surgery)
    measured = torch.cuda.max_memory_allocated() - before
    assert measured <= plan.device.total + (8 << 20), (measured / 2**20, str(plan))
    if not options:
        assert measured <= 1.2 * size


def test_rows_on_the_gpu_take_what_the_plan_says():
    for options in ({}, {"row_dtype": HALF}, {"row_dtype": HALF, "accumulate_dtype": SINGLE}):
        model = model_of(2048, 8)
        surgery = surgery_for(model, **options)
        plan = surgery.memory_plan()
        run(model, surgery)
        model.zero_grad()
        del surgery
        gc.collect()
        surgery = surgery_for(model, **options)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(model, surgery)
        measured = torch.cuda.max_memory_allocated() - before
        assert 0.85 * plan.total <= measured <= plan.total + (8 << 20), (measured / 2**20, str(plan))


def test_memory_is_unlocked_with_the_surgery():
    model, expected = model_of(), reference_run()
    for _ in range(4):
        surgery = surgery_for(model, row_device="cpu")
        run(model, surgery)
        assert_merged(model, expected, 1e-6)
        row = memory_of_rows(surgery)[0]
        assert row.is_pinned()
        del surgery, row
        gc.collect()


def test_what_is_not_finite_reaches_grad():
    model = model_of(64, 2)
    surgery = surgery_for(model, row_device="cpu")
    for t in range(TASKS):
        with surgery.task(t):
            (loss_of(model, t) * (torch.inf if t == 2 else 1.0)).backward()
    surgery.merge()
    assert not all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_bfloat16_parameters_with_float32_sums():
    model = model_of(dtype=HALF)
    surgery = surgery_for(model, row_device="cpu", accumulate_dtype=SINGLE)
    run(model, surgery, 3)
    assert_merged(model, reference_run(3, dtype=HALF), 5 * 4e-3)
