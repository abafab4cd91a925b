"""Triton instead of the compiled CUDA library: where the committed rows say so, and nowhere else."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import rows, tables
from fastpcgrad import backends
from fastpcgrad.backends import crossovers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (256 << 20, 1 << 30)
H200 = 90


def measured():
    """{(op, T, dtype): [(bytes of J, Triton's time by the compiled library's)]} of the last run on an H200."""
    times: dict[tuple[str, int, str, int], dict[str, float]] = {}
    every = [row for row in rows.read(rows.RESULTS / "gpu.jsonl") if "H200" in row.environment.device]
    for row in rows.latest(every):
        if (
            row.kind == "kernel"
            and row.subject == "fastpcgrad"
            and row.op in tables.GPU_OPS
            and row.p50_ms
            and not row.note
        ):
            times.setdefault((row.op, row.T or 0, row.dtype or "", row.N or 0), {})[row.backend] = row.p50_ms
    found: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
    for (op, tasks, dtype, width), both in times.items():
        nbytes = tasks * width * DTYPES[dtype].itemsize
        if nbytes >= 0.99 * SIZES[0]:  # widths are multiples of 64
            found.setdefault((op, tasks, dtype), []).append((nbytes, both["triton"] / both["cuda"]))
    return found


def test_the_choice_is_what_was_measured():
    found = measured()
    assert len(found) == 4 * 6 * 2 and all(len(ratios) == 3 for ratios in found.values())
    for (op, tasks, dtype), ratios in found.items():
        for size in SIZES:
            from_here = [ratio for nbytes, ratio in ratios if nbytes >= 0.99 * size]
            mean = sum(from_here) / len(from_here)
            chosen = crossovers.triton_is_faster(op, tasks, DTYPES[dtype], size, H200)
            # Near the margin either may be chosen; from the larger size on too where all sizes together say so.
            assert mean <= 0.97 if chosen else mean >= 0.95, (op, tasks, dtype, size, from_here)


def rows_on_a_gpu(tasks, nbytes, dtype=torch.float32):
    device = torch.device("cuda", 0)
    return SimpleNamespace(device=device, is_cpu=False, is_cuda=True, nbytes=nbytes, shape=(tasks, 1), dtype=dtype)


@pytest.fixture
def both_backends(monkeypatch):
    """Backends of a machine with a GPU, by their names."""
    modules = {name: ModuleType(f"{backends.__name__}.{name}") for name in ("cuda", "triton")}
    for module in modules.values():
        module.LARGEST_TASKS = 256
    monkeypatch.delenv("FASTPCGRAD_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_chosen", {(None, "cuda"): modules["cuda"], ("triton", "cuda"): modules["triton"]})
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device_type: None)
    monkeypatch.setattr(crossovers, "architecture_of", lambda device: H200)
    return modules


@pytest.mark.parametrize(
    ("op", "given", "chosen"),
    [
        ("combine", rows_on_a_gpu(4, 256 << 20), "triton"),
        ("combine", rows_on_a_gpu(4, (256 << 20) - 1), "cuda"),
        ("combine", rows_on_a_gpu(3, 1 << 30), "cuda"),  # not measured
        ("pcgrad", rows_on_a_gpu(16, 1 << 30, torch.float16), "triton"),
        ("pcgrad", rows_on_a_gpu(16, 1 << 30), "cuda"),
        ("pcgrad_", rows_on_a_gpu(16, 1 << 30, torch.bfloat16), "cuda"),
    ],
)
def test_large_rows_go_to_the_faster_one(both_backends, op, given, chosen):
    assert backends.select_for(op, given) is both_backends[chosen]


def test_a_forced_backend_and_other_architectures_stay(both_backends, monkeypatch):
    given = rows_on_a_gpu(4, 1 << 30)
    monkeypatch.setattr(crossovers, "architecture_of", lambda device: 80)
    assert backends.select_for("combine", given) is both_backends["cuda"]
    monkeypatch.setattr(crossovers, "architecture_of", lambda device: H200)
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "cuda")
    backends._chosen["cuda", "cuda"] = both_backends["cuda"]
    assert backends.select_for("combine", given) is both_backends["cuda"]


def test_without_triton_the_compiled_library_does_it_all(both_backends, monkeypatch):
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device_type: "no triton here")
    assert backends.select_for("combine", rows_on_a_gpu(4, 1 << 30)) is both_backends["cuda"]
