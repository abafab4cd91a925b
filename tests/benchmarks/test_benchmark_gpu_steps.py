"""The modes' steps of the GPU benchmark, on a model small enough for the CPU."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_steps, gpu_timing
from benchmarks.large import models, steps
from benchmarks.large.cases import SMALL, Batch, Case
from benchmarks.large.modes import WHOLE
from benchmarks.memory import Measured
from benchmarks.rows import environment
from benchmarks.targets import verdicts

CASE = Case(replace(SMALL, batch=Batch(1, 8)), 3)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu_steps, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_steps, "ROUNDS", 2)


@pytest.fixture(scope="module")
def here():
    return environment(threads=torch.get_num_threads())


@pytest.fixture
def peaks(monkeypatch):
    """Made-up peaks: each mode's prediction comes true, and rows in host memory leave one gradient on the device."""

    def answer(case, mode, activations, device, watching):
        beyond = 0 if activations else int(mode.beyond(case.tasks) * 100)
        return Measured(peak=(1000 if activations else 600) + beyond, gradients=400, width=100)

    monkeypatch.setattr(gpu_steps, "peak", answer)


def by_subject(found):
    return {row.subject: row for row in found}


def test_the_model_has_about_100_million_parameters():
    model = models.build(gpu_steps.CASE.size, 4, gpu_steps.CASE.size.batch, "meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e8, rel=0.05)
    assert model.trunk.positions.num_embeddings >= model.inputs.shape[1]


def test_every_mode_is_timed_by_whole_steps_and_merge_by_itself(here):
    precision = torch.get_float32_matmul_precision()
    found = by_subject(gpu_steps.step_rows(CASE, here, gpu_steps.modes()))
    assert list(found) == [mode.name for mode in gpu_steps.modes()] and all(row.ok for row in found.values())
    for name in ("streaming", "streaming[bf16 rows]", gpu_steps.HOST_ROWS):
        assert found[name].rounds == 2 and found[name].whole_ratios["plain"] > 0 and 0 < found[name].ratios[WHOLE] < 1
    assert found["plain"].p50_ms is None and {row.N for row in found.values()} == {steps.width_of(CASE)}
    assert torch.get_float32_matmul_precision() == precision


def test_a_mode_that_fails_says_why_and_the_others_are_measured(here, monkeypatch):
    def fail(*_):
        raise ValueError("not with this torch\nand more")

    chosen = [replace(mode, build=fail) if mode.name == "two_phase" else mode for mode in gpu_steps.modes()]
    for found in (gpu_steps.step_rows(CASE, here, chosen), gpu_steps.memory_rows(CASE, here, chosen)):
        status = {row.subject: row.status for row in found}
        assert status.pop("two_phase") == "failed: ValueError: not with this torch"
        assert set(status.values()) == {"ok"}


def test_peaks_are_beyond_model_and_activations(here, peaks):
    found = by_subject(gpu_steps.memory_rows(CASE, here, gpu_steps.modes()))
    assert found["streaming"].peak_bytes == 3 * 400 and found["streaming"].peak_ratio == 1
    assert found[gpu_steps.HOST_ROWS].peak_bytes == 800


def test_targets_read_the_rows(here, peaks):
    measured = [
        *gpu_steps.memory_rows(CASE, here, gpu_steps.modes()),
        *gpu_steps.step_rows(CASE, here, gpu_steps.modes()),
    ]
    found = verdicts(measured, gpu_steps.TARGETS)
    assert len(found) == 6 and all(verdict.worst is not None for verdict in found)
    assert found[-1].worst.value == 2 and found[-1].met


def test_nothing_but_torch_numpy_and_triton_is_needed():
    script = (
        "import sys\n"
        "for name in ('rich', 'torchjd', 'pytorch_optimizer', 'matplotlib', 'pytest'): sys.modules[name] = None\n"
        "import benchmarks.gpu, benchmarks.gpu_steps\n"
        "benchmarks.gpu_steps.modes()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=gpu_steps.rows.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
