"""The GPU benchmark's parts that need no GPU: its peer, its table, its plot."""

import dataclasses

import pytest
import torch

from benchmarks import gpu_table, rows
from benchmarks.peers import torchjd_algorithm
from fastpcgrad import reference

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
    kernel_row("combine", 8, None),
]


def test_the_table_shows_the_largest_rows_and_where_they_come_from():
    text = gpu_table.table(ROWS)
    assert "| cuda, float32, 8 | 93% |  |  |  |" in text and "50%" not in text
    assert "a GPU; copy 4000 GB/s" in text and "blocks" not in text


def test_the_table_shows_blocks_beside_packed_rows():
    row = dataclasses.replace(kernel_row("pcgrad_blocks", 4, 0.9), note="transformer", ratios={"packed": 1.06})
    text = gpu_table.table([*ROWS, row])
    assert "| transformer, cuda, float32, 4 | 1.000 | 1.06 |" in text and "90%" not in text


def test_the_table_names_where_triton_was_faster():
    slow, fast = (dataclasses.replace(kernel_row("gram", 8, 0.9, "triton"), p50_ms=time) for time in (1.0, 0.5))
    assert "over 3 % faster at: none." in gpu_table.table([*ROWS, slow])
    assert "over 3 % faster at: `gram` T=8 N=1000 float32." in gpu_table.table([*ROWS, fast])
    assert "Triton was" not in gpu_table.table(ROWS)


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


def test_torchjds_algorithm_is_pcgrad_with_its_order():
    grads = torch.randn(5, 40, dtype=torch.float64)
    torch.manual_seed(3)
    merged = torchjd_algorithm.kernel(grads)()
    torch.manual_seed(3)
    order = torch.stack([torch.randperm(5) for _ in range(5)])
    weights = reference.coefficients(reference.gram(grads), order).sum(dim=0)
    torch.testing.assert_close(merged, weights @ grads)
