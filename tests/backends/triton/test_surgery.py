"""The T×T solve and the fused surgery of the Triton backend against the oracle, and ahead-of-time compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpcgrad import reference
from fastpcgrad.backends import triton as backend
from fastpcgrad.variants import Guards
from tests.backends.triton.rows import (
    BF16,
    DEVICE,
    FP32,
    FP64,
    MARKS,
    check_gram,
    check_rows,
    random_order,
    random_rows,
)

pytest.importorskip("triton")
pytestmark = MARKS


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


def test_an_infinite_dot_product_projects_nothing() -> None:
    gram = torch.tensor([[1.0, -torch.inf], [-torch.inf, 1.0]], dtype=FP64, device=DEVICE)
    order = torch.tensor([[1, 0], [0, 1]], device=DEVICE)
    assert torch.equal(backend.pcgrad_coefficients(gram, order, Guards()).cpu(), torch.eye(2, dtype=FP64))


@pytest.mark.parametrize(
    ("tasks", "dtype", "scale"), [(2, FP32, 1.0), (5, FP32, 1e-30), (8, BF16, 1.0), (3, FP32, 1e18), (17, FP32, 1.0)]
)
def test_fused_pcgrad(tasks: int, dtype: torch.dtype, scale: float) -> None:
    width = 700 if tasks < 17 else 70
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


@pytest.mark.slow
def test_why_unavailable() -> None:
    ask = "from fastpcgrad.backends import triton; print(triton.why_unavailable('cpu'))"
    answer = subprocess.run([sys.executable, "-c", ask], env=compiling(), capture_output=True, text=True, check=True)
    assert "'cpu'" in answer.stdout and "TRITON_INTERPRET" in answer.stdout


def compiling() -> dict[str, str]:
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}


@pytest.mark.slow
def test_what_is_launched_again_is_what_triton_would_launch() -> None:
    script = Path(__file__).with_name("launch_again.py")
    result = subprocess.run([sys.executable, str(script)], env=compiling(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_every_kernel_compiles_without_spills() -> None:
    script = Path(__file__).with_name("compile_ahead.py")
    result = subprocess.run(
        [sys.executable, str(script), "--tasks=2,32"], env=compiling(), capture_output=True, text=True
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
