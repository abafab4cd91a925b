"""The GPU benchmark where there is no GPU: on the CPU and with its backends, on small J."""

import itertools

import pytest
import torch

from benchmarks import gpu, gpu_compile, gpu_timing, rows
from benchmarks.peers import torchjd_algorithm
from fastpcgrad import reference
from fastpcgrad.backends import cpu

ENVIRONMENT = rows.Environment("r", "2026-01-01", "c", "a GPU", 1, "2", "2", "0")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """On CPU tensors; what would be replays of a graph are calls. One fp32 J of 8 KiB is large."""
    if cpu.why_unavailable("cpu") is not None:
        pytest.skip("the C++ library stands in for the CUDA library")
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "BACKENDS", ("cpu", "eager"))
    monkeypatch.setattr(gpu, "cuda", cpu)
    monkeypatch.setattr(gpu, "LARGE", 8192)
    monkeypatch.setattr(gpu, "BYTES_OF_J", (8192,))
    monkeypatch.setattr(gpu, "replays_of", lambda call, count: lambda: [call() for _ in range(count)])
    started = gpu.Run(ENVIRONMENT, minutes=1.0, results=tmp_path / "gpu.jsonl")
    started.copy_gbps = 100.0
    return started


def by(found, **fields):
    return [row for row in found if all(getattr(row, name) == value for name, value in fields.items())]


def test_a_shape_is_measured_with_both_backends_torch_and_the_peers(run):
    gpu.measure_kernels(run, [(2, 500, torch.float32)], gpu.available(run))
    assert all(row.ok and row.p50_ms and row.gbps for row in run.rows)
    for backend in ("cpu", "eager"):
        ops = [row.op for row in by(run.rows, backend=backend)]
        assert ops == ["gram", "combine", "pcgrad", "pcgrad[graph]", "mix_"]
    assert [row.op for row in by(run.rows, subject="torch")] == ["gram", "combine", "mix_"]
    for peer in ("torchjd", "loop"):
        (row,) = by(run.rows, subject=peer)
        call, replay = (
            min(own.p50_ms for own in by(run.rows, subject="fastpcgrad", op=op)) for op in ("pcgrad", "pcgrad[graph]")
        )
        assert row.ratios == {"fastpcgrad": row.p50_ms / call, "fastpcgrad[graph]": row.p50_ms / replay}


def test_a_large_shape_has_its_share_of_the_bandwidth_and_no_replays(run):
    gpu.measure_kernels(run, [(2, 1024, torch.float32)], ["cpu"])
    (gram,) = by(run.rows, op="gram", backend="cpu")
    assert gram.bandwidth_fraction == gram.gbps / 100 and gram.gbps == pytest.approx(8192 / gram.p50_ms / 1e6)
    assert not by(run.rows, op="pcgrad[graph]")


def test_rows_are_in_the_file_as_soon_as_they_are_there(run, tmp_path):
    gpu.measure_kernels(run, [(2, 100, torch.float32)], ["cpu"])
    kept = rows.read(tmp_path / "gpu.jsonl")
    assert [(row.op, row.subject) for row in kept] == [(row.op, row.subject) for row in run.rows]


def test_a_call_that_fails_says_so_and_the_next_is_measured(run):
    grads = torch.randn(2, 100)
    failed = run.time("gram", "fastpcgrad", "cpu", grads, lambda: 1 // 0)
    assert failed.status == "failed: ZeroDivisionError: integer division or modulo by zero" and failed.p50_ms is None
    assert run.time("gram", "torch", "torch", grads, lambda: grads @ grads.T, against={"x": None}).ratios == {}


def test_a_backend_that_cannot_run_has_a_row_that_says_why(run, monkeypatch):
    monkeypatch.setattr(gpu, "BACKENDS", ("cpu", "cuda"))
    assert gpu.available(run) == ["cpu"]
    assert run.rows[-1].status == "missing: the CUDA library takes CUDA tensors only"


def test_after_the_deadline_nothing_is_measured(run, monkeypatch):
    run._deadline = 0.0
    gpu.measure_kernels(run, [(2, 100, torch.float32)], ["cpu"])
    gpu.measure_blocks(run)
    assert run.rows == []


def test_blocks_are_compared_with_packed_rows(run, monkeypatch):
    monkeypatch.setattr(gpu, "block_lists", lambda: {"three": [3, 100, 64]})
    monkeypatch.setattr(gpu, "TASKS_IN_BLOCKS", (2,))
    gpu.measure_blocks(run)
    packed, *_ = by(run.rows, dtype="float32", note="three, packed")
    for backend in ("cuda", "cuda, packing"):
        (row,) = by(run.rows, dtype="float32", backend=backend, op="pcgrad_blocks")
        assert row.ratios == {"packed": row.p50_ms / packed.p50_ms}


def test_bandwidths_are_rows(run):
    run.bandwidths(elements=1000)
    assert [row.op for row in run.rows] == ["copy", "read"] and run.copy_gbps > 0 and run.read_gbps > 0


def test_large_j_come_first_and_t_8_before_the_others():
    shapes = [*gpu.large_shapes(gpu.BYTES_OF_J), *gpu.small_shapes()]
    assert len(set(shapes)) == len(shapes) == 72
    assert shapes[:2] == [(8, 1 << 25, torch.float32), (8, 1 << 26, torch.bfloat16)]
    assert all(width * dtype.itemsize % 16 == 0 for _, width, dtype in shapes)


def test_every_width_needs_the_kernels_that_are_compiled_before(run, monkeypatch):
    pytest.importorskip("triton")
    from fastpcgrad.backends.triton import launch

    found = set()

    def note(choice, grid, *arguments):
        seen = [(a.dtype, a.data_ptr() % 16) if isinstance(a, torch.Tensor) else None for a in arguments]
        found.add((choice.kernel.__name__, str(choice.constants), str(seen)))

    monkeypatch.setattr(launch.Choice, "run", note)
    monkeypatch.setattr(gpu_compile, "DEVICE", "cpu")
    for tasks, dtype in itertools.product(gpu.TASKS, gpu.DTYPES):
        gpu_compile.compile_kernels(tasks, dtype)
        compiled = found.copy()
        for width in (*gpu.WIDTHS, (256 << 20) // (tasks * dtype.itemsize)):
            with gpu.forced_backend("triton"):
                for _, call in gpu.library_calls(torch.empty(tasks, width, dtype=dtype)):
                    call()
        assert found == compiled


@pytest.mark.slow
def test_kernels_are_compiled_in_other_processes(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_compile, "WIDTH", 64)
    gpu_compile.compile_all([(2, torch.float32), (0, torch.float32)])
    said = capsys.readouterr().out
    assert "compiling for T=0" in said and "T=2" not in said and "of 2 kinds of rows" in said


def test_a_slow_call_is_made_three_times(monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_timing, "SLOW", -1.0)
    assert gpu_timing.timed(lambda: calls.append(1)).rounds == 2 and len(calls) == 3


def test_the_rounds_of_a_call_are_bounded_and_its_time_is_of_one(monkeypatch):
    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_timing, "_times", lambda call, rounds: [4.0] * rounds)
    assert gpu_timing.timed(lambda: None, seconds=0.08, calls_of_one=2) == gpu_timing.Timing(2.0, 2.0, 2.0, 20)
    assert gpu_timing.timed(lambda: None, seconds=0.001).rounds == gpu_timing.LEAST
    assert gpu_timing.timed(lambda: None, seconds=10.0).rounds == gpu_timing.MOST


def test_what_was_measured_is_shown_last(run, capsys):
    run.add(rows.Row("kernel", "a case", "gram", "loop", ENVIRONMENT, status="failed: for a reason"))
    gpu.show(run)
    said = capsys.readouterr().out
    assert "not measured: streaming" in said and "failed: for a reason" in said and "a GPU; torch 2" in said


def test_torchjds_algorithm_is_pcgrad_with_its_order():
    grads = torch.randn(5, 40, dtype=torch.float64)
    torch.manual_seed(3)
    merged = torchjd_algorithm.kernel(grads)()
    torch.manual_seed(3)
    order = torch.stack([torch.randperm(5) for _ in range(5)])
    weights = reference.coefficients(reference.gram(grads), order).sum(dim=0)
    torch.testing.assert_close(merged, weights @ grads)


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert rows.commit() == "unknown"
