"""What is shown follows from the rows."""

import dataclasses
from dataclasses import replace

import pytest

from benchmarks import pages, plot, rows, tables, targets
from benchmarks.rows import Environment, Row
from benchmarks.steps import WHOLE

ENVIRONMENT = Environment(
    run="20260102T030405Z", date="2026-01-02", commit="0123456789ab", device="Some CPU, 2 cores", threads=2,
    torch="2.13.0", numpy="2.4.0", fastpcgrad="0.1.0",
)  # fmt: skip
GPU = Environment("r", "2026-01-01", "c", "a GPU", 1, "2", "2", "0")
WIDE = 1 << 24


def kernel(op, subject, p50, layout="contiguous", tasks=8, **more):
    return Row(
        kind="kernel", case=f"{op} T={tasks} N=2^24 float32 {layout}", op=op, subject=subject,
        environment=ENVIRONMENT, T=tasks, N=WIDE, dtype="float32", layout=layout, rounds=5,
        p20_ms=p50, p50_ms=p50, p80_ms=p50, **more,
    )  # fmt: skip


def step(subject, **more):
    return Row(
        kind="step", case="mlp T=4", op="step", subject=subject, environment=ENVIRONMENT,
        T=4, N=100, dtype="float32", **more,
    )  # fmt: skip


CPU_ROWS = [
    Row(
        kind="bandwidth", case="read bandwidth", op="read", subject="machine",
        environment=ENVIRONMENT, gbps=46.0,
    ),
    kernel(
        "pcgrad", "fastpcgrad", 40.0,
        ratios={"torchjd": 0.125, "loop": 0.02}, gbps=28.5, bandwidth_fraction=0.7,
    ),
    kernel("pcgrad", "torchjd", 320.0),
    kernel("pcgrad", "loop", 2000.0),
    kernel("pcgrad", "pytorch_optimizer", None, status="skipped: memory (99 GiB needed)"),
    kernel(
        "gram", "fastpcgrad", 15.0, ratios={"torch": 0.5}, gbps=35.0,
        bandwidth_fraction=0.6, bandwidth_fraction_in_turn=0.78,
    ),
    kernel("gram", "torch", 30.0, gbps=17.0, bandwidth_fraction=0.4),
    kernel(
        "gram", "fastpcgrad", 16.0, tasks=4, ratios={"torch": 1.5}, gbps=33.0,
        bandwidth_fraction=0.9, bandwidth_fraction_in_turn=0.72,
    ),
    kernel("gram", "torch", 11.0, tasks=4),
    step("plain"),
    step("fastpcgrad", ratios={"plain": 1.3}, whole_ratios={"plain": 1.15}),
    step("loop", ratios={"plain": 15.0}),
    step("torchjd", status="missing: No module named 'torchjd'"),
    Row(
        kind="memory", case="memory mlp T=4", op="step", subject="fastpcgrad", environment=ENVIRONMENT,
        peak_bytes=420, peak_ratio=1.04,
    ),
]  # fmt: skip


def test_verdicts_take_the_worst_case_and_show_a_loss_as_a_loss():
    found = {v.target.text: v for v in targets.verdicts(CPU_ROWS, targets.CPU)}
    torchjd = found["`pcgrad(J)`, T=8, N=2²⁴ fp32: speed against TorchJD's PCGrad"]
    assert (torchjd.value, torchjd.word) == ("8×", "met")
    loop = found["`pcgrad(J)`, T=8, N=2²⁴ fp32: speed against the loop"]
    assert (loop.value, loop.word) == ("50×", "MISSED")
    gram = found["`gram`, T ≤ 8, N=2²⁴, contiguous rows: of read bandwidth, in turn"]
    assert (gram.value, gram.word) == ("72 %", "MISSED")
    assert "T=4" in gram.case
    matmul = found["`gram`, all T and N: time against `J @ J.T`"]
    assert (matmul.value, matmul.word) == ("1.5×", "MISSED")
    memory = found["peak memory of a step beyond model and activations / T·N·itemsize"]
    assert (memory.value, memory.word) == ("1.04×", "met")
    whole = found["MLP, 13.7 M parameters, T=4: training step against one with plain backwards"]
    assert (whole.value, whole.word) == ("1.15×", "met")
    alone = found["MLP, 13.7 M parameters, T=4: `pc_backward` alone against plain backwards"]
    assert (alone.value, alone.word) == ("1.3×", "MISSED")
    assert found["tutorial 10-50-1, T=2: `pc_backward` alone against plain backwards"].word == "not measured"


def test_the_readmes_table_holds_the_measured_values_and_their_origin():
    table = tables.cpu(CPU_ROWS)
    lines = table.splitlines()
    assert "| `pcgrad(J)`, T=8 | 40 ms | 28.5 GB/s |  | 8× | 50× | skipped: memory |" in lines
    assert "| `gram(J)`, T=4 | 16 ms | 33 GB/s | 0.667× |  |  |  |" in lines
    assert "| mlp T=4, 100 parameters | 1.30× | 15.00× | missing: No module named 'torchjd' |" in lines
    assert lines[-1].startswith("Measured on Some CPU, 2 cores, 2 threads, read 46.0 GB/s;")
    assert lines[-1].endswith("commit 0123456789ab; 2026-01-02.")
    assert "not measured" not in table
    with pytest.raises(ValueError, match="no rows"):
        tables.cpu([])


def gpu_kernel(op, tasks, fraction, backend="cuda", width=1000):
    return Row(
        "kernel", f"{op} T={tasks}", op, "fastpcgrad", GPU, backend=backend, T=tasks, N=width, dtype="float32",
        p50_ms=1.0, gbps=100.0, bandwidth_fraction=fraction,
    )  # fmt: skip


GPU_ROWS = [
    Row("bandwidth", "copy bandwidth", "copy", "machine", GPU, gbps=4000.0),
    gpu_kernel("gram", 8, 0.5, width=10),
    gpu_kernel("gram", 8, 0.93),
    gpu_kernel("gram", 2, 0.71),
    gpu_kernel("combine", 8, None),
]


def peer_row(name, width, ratios, note=""):
    row = gpu_kernel("pcgrad", 8, None, "torch", width)
    return replace(row, subject=name, ratios=ratios, note=note)


def mode_rows(name, status="ok"):
    row = Row("step", "gpt", "large", name, GPU, status=status, T=4, N=98_000_000, note="whole step")
    peak = replace(row, kind="memory", note="2 steps")
    if status != "ok":
        return [row, peak]
    timed = replace(row, whole_p50_ms=50.0, whole_ratios={"plain": 1.04}, ratios={WHOLE: 0.021})
    return [timed, replace(peak, peak_ratio=1.01)]


def test_shares_are_of_the_largest_j_a_column_for_each_t():
    text = tables.gpu(GPU_ROWS)
    assert "| op, backend, rows | T=2 | T=8 |" in text
    assert "| `gram`, cuda, float32 | 71% | 93% |" in text and "50%" not in text and "combine" not in text
    assert text.endswith("a GPU; copy 4000 GB/s; torch 2; commit c, 2026-01-01.")
    assert not any(word in text for word in ("blocks", "peer", "Small J", "transformer"))


def test_it_is_named_where_triton_was_faster():
    slow, fast = (replace(gpu_kernel("gram", 8, 0.9, "triton"), p50_ms=time) for time in (1.0, 0.5))
    assert "over 3 % faster at: none." in tables.gpu([*GPU_ROWS, slow])
    assert "over 3 % faster at: `gram` T=8 float32." in tables.gpu([*GPU_ROWS, fast])
    assert "Triton was" not in tables.gpu(GPU_ROWS)


def test_small_j_have_a_call_and_a_replay():
    call, replay = (replace(gpu_kernel(op, 8, None), p50_ms=0.1) for op in ("pcgrad", "pcgrad[graph]"))
    alone = gpu_kernel("pcgrad", 4, None, width=7)
    text = tables.gpu([*GPU_ROWS, call, replace(replay, p50_ms=0.0156), alone])
    assert "| cuda, float32, N=1000 | 100.0 / 15.6 |" in text and "N=7" not in text


def test_peers_are_compared_with_the_call_and_with_the_replay():
    both = {"fastpcgrad": 5.25, "fastpcgrad[graph]": 512.3}
    small, large = peer_row("torchjd", 1000, both, "an algorithm"), peer_row("loop", 1 << 25, {"fastpcgrad": 30.0})
    of_a_method = replace(large, kind="method", op="UPGrad.aggregation", subject="torchjd", N=1 << 22)
    text = tables.gpu([*GPU_ROWS, large, small, of_a_method])
    assert "| TorchJD's algorithm, float32, N=1000 | 5.25 / 512 |" in text
    assert "| loop, float32, J of 1024 MiB | 30 |" in text
    assert text.index("TorchJD's") < text.index("| loop") and "128 MiB" not in text and "4194304" not in text


def test_blocks_stand_beside_packed_rows():
    row = replace(gpu_kernel("pcgrad_blocks", 4, 0.9), note="transformer", ratios={"packed": 1.06})
    text = tables.gpu([*GPU_ROWS, row])
    assert "| transformer, cuda, float32 | 1.000, 1.06 |" in text and "90%" not in text


def test_modes_have_times_and_peaks_or_say_why_not():
    found = [*mode_rows("streaming"), *mode_rows("two_phase", "failed: for a reason")]
    text = tables.gpu([*GPU_ROWS, *found])
    assert "A transformer of 98 M parameters, T=4: whole step; peaks beyond model and activations, 2 steps:" in text
    assert "| streaming | 50.0 | 1.040 | 2.1% | 1.010 | 4.04 |" in text
    assert "| two_phase | failed: for a reason |  |  | failed: for a reason |  |" in text


def test_a_step_of_gradnorm_is_shown_against_both_floors():
    row = replace(step("fastpcgrad", p20_ms=1.0, p50_ms=2.0, p80_ms=3.0), op="gradnorm")
    text = tables.gradnorm([replace(row, ratios={"double backward": 0.5, "equal weights": 1.25})])
    assert text.splitlines()[-1] == "| mlp T=4 | fastpcgrad | 1.000 | 2.000 | 3.000 | 0.50× | 1.25× |"
    assert tables.gradnorm(CPU_ROWS) == ""


def method_row(op, subject, tasks, p50_ms, **fields):
    environment = replace(GPU, device="a CPU", threads=2, commit="c0ffee", torch="2.13")
    return Row("method", f"{op} T={tasks}", op, subject, environment, T=tasks, N=100, p50_ms=p50_ms, **fields)


METHOD_ROWS = [
    method_row("read twice", "machine", 2, 1.5),
    method_row("UPGrad.aggregation", "fastpcgrad", 2, 2.0, ratios={"torchjd": 0.1}),
    method_row("UPGrad.aggregation", "torchjd", 2, 20.0, ratios={"fastpcgrad": 10.0}, subject_version="0.18"),
    method_row("UPGrad.weights", "fastpcgrad", 2, 0.012, ratios={"torchjd": 0.8}),
    method_row("UPGrad.weights", "torchjd", 2, 0.015, ratios={"fastpcgrad": 1.25}),
    method_row("GradDrop.aggregation", "fastpcgrad", 2, 30.0, ratios={"torchjd": 2.0}),
    method_row("GradDrop.aggregation", "torchjd", 2, 15.0, ratios={"fastpcgrad": 0.5}),
]


def test_each_method_has_a_line_with_both_times_and_the_factors():
    lines = tables.methods(METHOD_ROWS).splitlines()
    assert lines[0] == "| method | weights, µs, T=2 | aggregation, ms, T=2 |"
    assert lines[2:5] == [
        "| `GradDrop` |  | 30 (0.5×) |",
        "| `UPGrad` | 12 (1.25×) | 2 (10×) |",
        "| *J read twice* |  | 1.5 |",
    ]
    assert "weights: 0 of 1 at least 5 times as fast as TorchJD, 0 slower" in lines[6]
    assert "aggregation: 1 of 2 at least 5 times as fast as TorchJD, 1 slower" in lines[6]
    assert "a CPU" in lines[8] and "c0ffee" in lines[8] and "TorchJD 0.18" in lines[8] and "N=100" in lines[8]


def test_without_a_peer_there_is_no_factor():
    missing = method_row("UPGrad.aggregation", "torchjd", 2, None, status="missing: x")
    found = tables.methods([dataclasses.replace(METHOD_ROWS[1], ratios={}), missing])
    assert "| `UPGrad` |  | 2 |" in found and "times as fast" not in found


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.path.name)
def test_the_committed_pages_are_what_the_rows_give(page):
    assert not page.is_stale()


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with an old table, and rows of another in two files."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    found = pages.Page(tmp_path / "page.md", ("times", "peaks"), "m", lambda latest: f"{len(latest)} rows")
    found.path.write_text("# Title\n\n<!-- m:start -->\nold\n<!-- m:end -->\n\nEnd\n", encoding="utf-8")
    rows.append(CPU_ROWS[:2], tmp_path / "times.jsonl")
    rows.append(CPU_ROWS[2:], tmp_path / "peaks.jsonl")
    return found


def test_what_stood_between_the_markers_is_replaced(page, monkeypatch, capsys):
    monkeypatch.setattr(plot, "PAGES", (page,))
    monkeypatch.setattr(plot, "draw", lambda folder: [])
    assert page.is_stale() and plot.main(["--check"]) == 1 and "old" in page.path.read_text(encoding="utf-8")
    assert "page.md's table is not what the rows give" in capsys.readouterr().err
    assert plot.main([]) == 0 and plot.main(["--check"]) == 0
    expected = f"# Title\n\n<!-- m:start -->\n{len(CPU_ROWS)} rows\n<!-- m:end -->\n\nEnd\n"
    assert page.path.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("text", ["", "S", "E S", "SESE"])
def test_a_page_without_a_place_is_refused(page, text):
    page.path.write_text(text.replace("S", "<!-- m:start -->").replace("E", "<!-- m:end -->"), encoding="utf-8")
    with pytest.raises(ValueError, match="must hold <!-- m:start --> and <!-- m:end --> once each"):
        page.written()


def test_without_rows_pages_of_a_gpu_and_of_methods_say_so():
    assert tables.gpu([]) == tables.methods([]) == "Not yet measured."


def test_plots_are_drawn_and_equal_rows_give_equal_files(tmp_path):
    pytest.importorskip("matplotlib")
    large = [row for size in (10, 100) for row in (replace(r, N=size) for r in mode_rows("streaming"))]

    def drawn(folder):
        made = [*plot.draw_cpu(CPU_ROWS, folder), *plot.draw_large(large, folder), *plot.draw_gpu(GPU_ROWS, folder)]
        return {path.name: path.read_bytes() for path in made}

    first = drawn(tmp_path / "a")
    assert sorted(first) == ["bandwidth.png", "gpu.png", "kernels.png", "large.png", "memory.png", "steps.png"]
    assert first == drawn(tmp_path / "b") and all(3_000 < len(image) < 1_000_000 for image in first.values())
    assert not plot.draw_cpu(CPU_ROWS[:1], tmp_path) and not plot.draw_large([], tmp_path)
    assert not plot.draw_gpu([], tmp_path)
