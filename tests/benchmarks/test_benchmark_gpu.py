"""The GPU benchmark where there is no GPU: on the CPU and with its backends, on small J."""

import itertools
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu, gpu_compile, method_cases, rows
from benchmarks.cases import TINY_GPT, StepCase
from benchmarks.kernels import Contender, inputs
from benchmarks.session import Run
from fastpcgrad import backends
from fastpcgrad.backends import cpu

ENVIRONMENT = rows.Environment("r", "2026-01-01", "c", "a GPU", 1, "2", "2", "0")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """On CPU tensors; what would be replays of a graph are calls. One fp32 J of 8 KiB is large."""
    if cpu.why_unavailable("cpu") is not None:
        pytest.skip("the C++ library stands in for the CUDA library")
    monkeypatch.setattr(gpu, "BACKENDS", ("cpu", "eager"))
    monkeypatch.setattr(gpu, "cuda", cpu)
    monkeypatch.setattr(gpu, "LARGE", 8192)
    monkeypatch.setattr(gpu, "BYTES_OF_J", (8192,))
    monkeypatch.setattr(gpu, "METHODS_WIDTH", 64)
    monkeypatch.setattr(gpu, "replays_of", lambda call, count: lambda: [call() for _ in range(count)])
    started = Run(ENVIRONMENT, results=tmp_path / "gpu.jsonl")
    started.add([started.row("bandwidth", "copy bandwidth", "copy", "machine", gbps=100.0)])
    return started


def by(run, **fields):
    return [row for row in run.rows[1:] if all(getattr(row, name) == value for name, value in fields.items())]


def test_a_shape_is_measured_with_both_backends_torch_and_the_peers(run):
    gpu.measure_kernels(run, [(2, 500, torch.float32)], gpu.available(run))
    assert all(row.ok and row.p50_ms and row.gbps for row in by(run))
    for backend in ("cpu", "eager"):
        ops = [row.op for row in by(run, backend=backend)]
        assert ops == ["gram", "combine", "pcgrad", "pcgrad[graph]", "mix_"]
    assert [row.op for row in by(run, subject="torch")] == ["gram", "combine", "mix_"]
    for peer in ("torchjd", "loop"):
        (row,) = by(run, subject=peer)
        call, replay = (
            min(own.p50_ms for own in by(run, subject="fastpcgrad", op=op)) for op in ("pcgrad", "pcgrad[graph]")
        )
        assert row.ratios == {"fastpcgrad": row.p50_ms / call, "fastpcgrad[graph]": row.p50_ms / replay}


def test_a_large_shape_has_its_share_of_the_bandwidth_and_no_replays(run):
    gpu.measure_kernels(run, [(2, 1024, torch.float32)], ["cpu"])
    (gram,) = by(run, op="gram", backend="cpu")
    assert gram.bandwidth_fraction == gram.gbps / 100 and gram.gbps == pytest.approx(8192 / gram.p50_ms / 1e6)
    assert not by(run, op="pcgrad[graph]")


def test_rows_are_in_the_file_as_soon_as_they_are_there(run, tmp_path):
    gpu.measure_kernels(run, [(2, 100, torch.float32)], ["cpu"])
    kept = rows.read(tmp_path / "gpu.jsonl")
    assert [(row.op, row.subject) for row in kept] == [(row.op, row.subject) for row in run.rows]


def test_without_torchjd_its_algorithm_is_measured_and_the_row_says_so(run, monkeypatch):
    absent = gpu.kernels.Peer("torchjd", "absent", "absent_peer", "torchjd", 0, False)
    monkeypatch.setattr(gpu.kernels, "PEERS", (absent, *gpu.kernels.PEERS[1:]))
    gpu.measure_kernels(run, [(2, 100, torch.float32)], ["cpu"])
    (row,) = by(run, subject="torchjd")
    assert row.ok and "written anew" in row.note and row.subject_version == ""


def test_a_call_that_fails_says_so_and_the_next_is_measured(run):
    x = inputs(torch.randn(2, 100))
    failed = gpu.time_op(run, "gram", Contender("fastpcgrad", "", "cpu", lambda x: lambda: 1 // 0), x)
    assert failed.status == "failed: ZeroDivisionError: integer division or modulo by zero" and failed.p50_ms is None
    plain = Contender("torch", "", "torch", gpu.kernels.TORCH_OPS["gram"])
    assert gpu.time_op(run, "gram", plain, x, against={"x": None}).ratios == {}


def test_a_backend_that_cannot_run_has_a_row_that_says_why(run, monkeypatch):
    monkeypatch.setattr(gpu, "BACKENDS", ("cpu", "cuda"))
    assert gpu.available(run) == ["cpu"]
    assert run.rows[-1].status == "missing: the CUDA library takes CUDA tensors only"


def test_after_the_deadline_nothing_is_measured(run, capsys):
    run.allow(minutes=-1)
    gpu.measure_kernels(run, [(2, 100, torch.float32)], ["cpu"])
    gpu.measure_methods(run)
    gpu.measure_blocks(run)
    assert not by(run) and "the time was up" in capsys.readouterr().out


def test_blocks_are_compared_with_packed_rows(run, monkeypatch):
    monkeypatch.setattr(gpu, "block_lists", lambda device: {"three": [3, 100, 64]})
    monkeypatch.setattr(gpu, "TASKS_IN_BLOCKS", (2,))
    gpu.measure_blocks(run)
    assert all(row.ok for row in by(run)), [row.status for row in by(run)]
    packed, *_ = by(run, dtype="float32", note="three, packed")
    for backend in ("cuda", "cuda, packing"):
        (row,) = by(run, dtype="float32", backend=backend, op="pcgrad_blocks")
        assert row.ratios == {"packed": row.p50_ms / packed.p50_ms}
    assert [row.backend for row in by(run, op="pcgrad_blocks[graph]")] == ["cuda", "cuda"]


def test_bandwidths_are_rows(run):
    gpu.measure_bandwidths(run, elements=1000)
    assert [row.op for row in by(run)] == ["copy", "read"] and all(row.gbps > 0 and row.backend for row in by(run))


def test_large_j_come_first_and_t_8_before_the_others():
    shapes = [*gpu.large_shapes(gpu.BYTES_OF_J), *gpu.small_shapes()]
    assert len(set(shapes)) == len(shapes) == 72
    assert shapes[:2] == [(8, 1 << 25, torch.float32), (8, 1 << 26, torch.bfloat16)]
    assert all(width * dtype.itemsize % 16 == 0 for _, width, dtype in shapes)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a peer's solver
def test_every_method_is_compared_with_torchjds(run, monkeypatch):
    aggregation = pytest.importorskip("torchjd.aggregation")
    monkeypatch.setattr(method_cases, "TASKS", (3,))
    every = method_cases.names
    theirs = [name for name in every(3) if hasattr(aggregation, method_cases._THEIR_NAMES.get(name, name))]
    assert set(every(3)) - set(theirs) == {"AGEM", "CRMOGM", "MetaBalance"}
    monkeypatch.setattr(method_cases, "names", lambda tasks: theirs)
    gpu.measure_methods(run)
    found = by(run)
    assert all(row.ok for row in found), [row.status for row in found if not row.ok]
    assert [row.subject for row in found] == ["fastpcgrad", "torchjd"] * len(method_cases.names(3))
    for own, their in zip(found[::2], found[1::2], strict=True):
        assert own.case == their.case and their.ratios == {"fastpcgrad": pytest.approx(their.p50_ms / own.p50_ms)}


def test_a_method_that_is_missing_or_fails_has_a_row_that_says_so(run, monkeypatch):
    def theirs(name, tasks, dtype, device):
        if name == "Sum":
            raise ImportError("no such peer")
        return lambda grads: 1 // 0

    monkeypatch.setattr(method_cases, "TASKS", (2,))
    monkeypatch.setattr(method_cases, "names", lambda tasks: ["Mean", "Sum"])
    monkeypatch.setattr(method_cases, "theirs", theirs)
    gpu.measure_methods(run)
    assert [row.status for row in by(run)] == [
        "ok",
        "failed: ZeroDivisionError: integer division or modulo by zero",
        "ok",
        "missing: no such peer",
    ]


def test_the_model_has_about_100_million_parameters_and_room_for_its_batch():
    assert gpu.models.width_of(gpu.STEPS) == pytest.approx(1e8, rel=0.05)
    assert gpu.STEPS.model.context >= gpu.STEPS.batch.length


@pytest.mark.slow
def test_steps_and_peaks_are_measured(run):
    gpu.measure_steps(run, StepCase(TINY_GPT, 2, TINY_GPT.batch))
    assert {row.kind for row in by(run)} == {"step", "memory"} and all(row.ok for row in by(run))
    assert by(run, kind="memory")[0].note.endswith("batch 1 x 32 tokens")


def test_what_was_measured_is_shown_last(run, capsys):
    run.add([run.row("kernel", "a case", "gram", "loop", status="failed: for a reason")])
    gpu.show(run)
    said = capsys.readouterr().out
    assert "not measured: streaming" in said and "failed: for a reason" in said and "a GPU; copy 100" in said


def test_every_width_needs_the_kernels_that_are_compiled_before(run, monkeypatch):
    pytest.importorskip("triton")
    from fastpcgrad.backends.triton import launch

    found = set()

    def note(choice, grid, *arguments):
        seen = [(a.dtype, a.data_ptr() % 16) if isinstance(a, torch.Tensor) else None for a in arguments]
        found.add((choice.kernel.__name__, str(choice.constants), str(seen)))

    monkeypatch.setattr(launch.Choice, "run", note)
    for tasks, dtype in itertools.product(gpu.TASKS, gpu.DTYPES):
        gpu_compile.compile_kernels(tasks, dtype, "cpu")
        compiled = found.copy()
        for width in (*gpu.WIDTHS, (256 << 20) // (tasks * dtype.itemsize)):
            grads = torch.empty(tasks, width, dtype=dtype)
            x = inputs(grads, gpu.order_of(grads))
            with backends.forcing("triton"):
                for op in gpu.kernels.LIBRARY_OPS:
                    gpu.ours(op, "triton").build(x)()
        assert found == compiled


@pytest.mark.slow
def test_kernels_are_compiled_in_other_processes(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_compile, "WIDTH", 64)
    gpu_compile.compile_all([(2, torch.float32), (3, torch.int32)], "cpu")
    said = capsys.readouterr().out
    assert "compiling (3, torch.int32)" in said and "(2, torch" not in said and "of 2 kinds" in said


@pytest.mark.slow
def test_nothing_but_torch_numpy_and_triton_is_needed():
    script = (
        "import sys\n"
        "absent = 'rich', 'torchjd', 'pytorch_optimizer', 'matplotlib', 'pytest', 'pytest_benchmark', 'cpuinfo'\n"
        "for name in absent: sys.modules[name] = None\n"
        "from benchmarks import gpu\n"
        "gpu.modes(gpu.STEPS, on_gpu=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=rows.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
