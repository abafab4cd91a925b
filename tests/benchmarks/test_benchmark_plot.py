"""What is shown follows from the rows."""

import pytest

from benchmarks import plot, rows, targets
from benchmarks.rows import Environment, Row

ENVIRONMENT = Environment(
    run="20260102T030405Z", date="2026-01-02", commit="0123456789ab", device="Some CPU, 2 cores", threads=2,
    torch="2.13.0", numpy="2.4.0", fastpcgrad="0.1.0",
)  # fmt: skip
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


ROWS = [
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
    found = {v.target.text: v for v in targets.verdicts(ROWS)}
    torchjd = found["`pcgrad(J)`, T=8, N=2²⁴ fp32: speed against TorchJD's PCGrad"]
    assert (torchjd.value, torchjd.word) == ("8×", "met")
    loop = found["`pcgrad(J)`, T=8, N=2²⁴ fp32: speed against the loop"]
    assert (loop.value, loop.word) == ("50×", "MISSED")
    gram = found["`gram`, T ≤ 8, N=2²⁴, contiguous rows: of read bandwidth, in turn"]
    assert (gram.value, gram.word) == ("72 %", "MISSED")
    assert "T=4" in gram.worst.case
    matmul = found["`gram`, all T and N: time against `J @ J.T`"]
    assert (matmul.value, matmul.word) == ("1.5×", "MISSED")
    memory = found["peak memory of a step beyond model and activations / T·N·itemsize"]
    assert (memory.value, memory.word) == ("1.04×", "met")
    whole = found["MLP, 13.7 M parameters, T=4: training step against one with plain backwards"]
    assert (whole.value, whole.word) == ("1.15×", "met")
    alone = found["MLP, 13.7 M parameters, T=4: `pc_backward` alone against plain backwards"]
    assert (alone.value, alone.word) == ("1.3×", "MISSED")
    assert found["tutorial 10-50-1, T=2: `pc_backward` alone against plain backwards"].word == "not measured"


def test_the_table_holds_the_measured_values_and_their_origin():
    table = plot.table(ROWS)
    lines = table.splitlines()
    assert "| `pcgrad(J)`, T=8 | 40 ms | 28.5 GB/s |  | 8× | 50× | skipped: memory |" in lines
    assert "| `gram(J)`, T=4 | 16 ms | 33 GB/s | 0.667× |  |  |  |" in lines
    assert "| mlp T=4, 100 parameters | 1.30× | 15.00× | missing: No module named 'torchjd' |" in lines
    assert lines[-1].startswith("Measured on Some CPU, 2 cores, 2 threads, read 46.0 GB/s;")
    assert lines[-1].endswith("commit 0123456789ab; 2026-01-02.")
    assert "not measured" not in table


def test_without_rows_there_is_no_table():
    with pytest.raises(ValueError, match="no rows"):
        plot.table([])


def test_check_fails_until_the_readme_is_rewritten(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, readme, images = tmp_path / "rows.jsonl", tmp_path / "README.md", tmp_path / "images"
    rows.append(ROWS, results)
    readme.write_text(f"# Title\n\n{plot.START}\nold\n{plot.END}\n\nEnd\n")
    options = ["--results", str(results), "--readme", str(readme), "--images", str(images)]
    assert plot.main([*options, "--check"]) == 1
    assert "old" in readme.read_text() and not images.exists()
    assert plot.main(options) == 0
    assert plot.main([*options, "--check"]) == 0
    written = readme.read_text()
    assert written.startswith("# Title\n") and written.endswith("\n\nEnd\n") and "old" not in written
    drawn = sorted(path.name for path in images.iterdir())
    assert drawn == ["bandwidth.png", "kernels.png", "memory.png", "steps.png"]
    assert sum(path.stat().st_size for path in images.iterdir()) < 1_000_000


def test_check_says_what_is_missing(tmp_path, capsys):
    assert plot.main(["--check", "--results", str(tmp_path / "none"), "--readme", str(tmp_path / "README.md")]) == 1
    assert capsys.readouterr().err
