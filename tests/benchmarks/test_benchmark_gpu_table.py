"""The table and the plot of the GPU's rows, from rows that were made up."""

from dataclasses import replace

import pytest

from benchmarks import gpu_table, rows
from benchmarks.large.modes import WHOLE

ENVIRONMENT = rows.Environment("r", "2026-01-01", "c", "a GPU", 1, "2", "2", "0")


def kernel_row(op, tasks, fraction, backend="cuda", width=1000):
    return rows.Row(
        "kernel", f"{op} T={tasks}", op, "fastpcgrad", ENVIRONMENT, backend=backend, T=tasks, N=width, dtype="float32",
        p50_ms=1.0, gbps=100.0, bandwidth_fraction=fraction,
    )  # fmt: skip


ROWS = [
    rows.Row("bandwidth", "copy bandwidth", "copy", "machine", ENVIRONMENT, gbps=4000.0),
    kernel_row("gram", 8, 0.5, width=10),
    kernel_row("gram", 8, 0.93),
    kernel_row("gram", 2, 0.71),
    kernel_row("combine", 8, None),
]


def peer_row(name, width, ratios, note=""):
    row = kernel_row("pcgrad", 8, None, "torch", width)
    return replace(row, subject=name, ratios=ratios, note=note)


def mode_rows(name, status="ok"):
    row = rows.Row("step", "gpt", "large", name, ENVIRONMENT, status=status, T=4, N=98_000_000, note="whole step")
    peak = replace(row, kind="memory", note="2 steps")
    if status != "ok":
        return [row, peak]
    timed = replace(row, whole_p50_ms=50.0, whole_ratios={"plain": 1.04}, ratios={WHOLE: 0.021})
    return [timed, replace(peak, peak_ratio=1.01)]


def test_shares_are_of_the_largest_j_a_column_for_each_t():
    text = gpu_table.table(ROWS)
    assert "| op, backend, rows | T=2 | T=8 |" in text
    assert "| `gram`, cuda, float32 | 71% | 93% |" in text and "50%" not in text and "combine" not in text
    assert text.endswith("a GPU; copy 4000 GB/s; torch 2; commit c, 2026-01-01.")
    assert not any(word in text for word in ("blocks", "peer", "Small J", "transformer"))


def test_it_is_named_where_triton_was_faster():
    slow, fast = (replace(kernel_row("gram", 8, 0.9, "triton"), p50_ms=time) for time in (1.0, 0.5))
    assert "over 3 % faster at: none." in gpu_table.table([*ROWS, slow])
    assert "over 3 % faster at: `gram` T=8 float32." in gpu_table.table([*ROWS, fast])
    assert "Triton was" not in gpu_table.table(ROWS)


def test_small_j_have_a_call_and_a_replay():
    call, replay = (replace(kernel_row(op, 8, None), p50_ms=0.1) for op in ("pcgrad", "pcgrad[graph]"))
    alone = kernel_row("pcgrad", 4, None, width=7)
    text = gpu_table.table([*ROWS, call, replace(replay, p50_ms=0.0156), alone])
    assert "| cuda, float32, N=1000 | 100.0 / 15.6 |" in text and "N=7" not in text


def test_peers_are_compared_with_the_call_and_with_the_replay():
    both = {"fastpcgrad": 5.25, "fastpcgrad[graph]": 512.3}
    small, large = peer_row("torchjd", 1000, both, "an algorithm"), peer_row("loop", 1 << 25, {"fastpcgrad": 30.0})
    text = gpu_table.table([*ROWS, large, small])
    assert "| TorchJD's algorithm, float32, N=1000 | 5.25 / 512 |" in text
    assert "| loop, float32, J of 1024 MiB | 30 |" in text
    assert text.index("TorchJD's") < text.index("| loop")


def test_blocks_stand_beside_packed_rows():
    row = replace(kernel_row("pcgrad_blocks", 4, 0.9), note="transformer", ratios={"packed": 1.06})
    text = gpu_table.table([*ROWS, row])
    assert "| transformer, cuda, float32 | 1.000, 1.06 |" in text and "90%" not in text


def test_modes_have_times_and_peaks_or_say_why_not():
    found = [*mode_rows("streaming"), *mode_rows("two_phase", "failed: for a reason")]
    text = gpu_table.table([*ROWS, *found])
    assert "A transformer of 98 M parameters, T=4: whole step; peaks beyond model and activations, 2 steps:" in text
    assert "| streaming | 50.0 | 1.040 | 2.1% | 1.010 | 4.04 |" in text
    assert "| two_phase | failed: for a reason |  |  | failed: for a reason |  |" in text


def test_without_rows_the_page_says_so():
    page = f"a\n{gpu_table.START}\nold\n{gpu_table.END}\nb\n"
    assert gpu_table.written(page, []) == f"a\n{gpu_table.START}\nNot yet measured.\n{gpu_table.END}\nb\n"
    with pytest.raises(ValueError, match="must hold"):
        gpu_table.written("no markers", [])


def test_the_page_is_what_the_rows_give():
    latest = rows.latest(rows.read(gpu_table.RESULTS))
    page = gpu_table.PAGE.read_text(encoding="utf-8")
    assert gpu_table.written(page, latest) == page


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    gpu_table.plot(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
