"""Triton's kernels on rows in blocks: where these are whole, aligned, absent or of many tasks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpcgrad import _ops, reference
from fastpcgrad._blocks import Blocks, addresses
from fastpcgrad.backends import stacked
from fastpcgrad.backends import triton as backend
from fastpcgrad.variants import Guards
from tests.backends.triton.rows import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    FP64,
    MARKS,
    check_gram,
    check_rows,
    random_order,
    random_rows,
    random_weights,
)

pytest.importorskip("triton")
pytestmark = MARKS

WIDTHS = (1200, 5, 0, 4099, 513)
"""The second to last block has whole pieces and a rest."""
FEW = (130, 5, 70)
"""Of many tasks pieces are narrow, and each takes the interpreter long."""


def scattered(rows: Tensor, widths: Sequence[int] = WIDTHS, offset: int = 0) -> Blocks:
    """The rows cut into blocks, each in memory of its own that begins ``offset`` elements behind a multiple of 16."""
    tensors: list[list[Tensor | None]] = []
    for row in rows:
        memory = [row.new_empty(width + offset)[offset:] for width in widths]
        torch._foreach_copy_(memory, list(row.split(list(widths))))
        tensors.append(list(memory))
    return Blocks(tensors, list(map(addresses, tensors)), array("q", widths), rows.dtype, rows.device)


def without(blocks: Blocks, rows: Tensor, absent: Sequence[tuple[int, int]]) -> tuple[Blocks, Tensor]:
    """Some tasks' gradients of some blocks are absent, and zero in the rows."""
    tensors, rows = list(map(list, blocks.tensors)), rows.clone()
    for task, b in absent:
        tensors[task][b] = None
        first = sum(blocks.widths[:b])
        rows[task, first : first + blocks.widths[b]] = 0
    return blocks._replace(tensors=tensors, pointers=list(map(addresses, tensors))), rows


def new_out(blocks: Blocks, offset: int = 0) -> list[Tensor]:
    return [torch.empty(width + offset, dtype=blocks.dtype, device=DEVICE)[offset:] for width in blocks.widths]


ROWS = [(2, FP32), (8, FP32), (3, BF16), (4, FP16), (5, FP64), (9, BF16), (13, FP32)]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("tasks", "dtype"), ROWS, ids=str)
def test_a_surgery_of_aligned_and_other_rows(tasks: int, dtype: torch.dtype, offset: int) -> None:
    widths = WIDTHS if tasks < 9 else FEW
    rows, order = random_rows(tasks, sum(widths), dtype), random_order(tasks)
    blocks, rows = without(scattered(rows, widths, offset), rows, [(0, 1), (tasks - 1, 0)])
    out = new_out(blocks, offset)
    gram, weights, coefficients, _ = backend.pcgrad_blocks(blocks, order, Guards(), 0.5, out)()
    check_gram(gram, rows)
    expected = reference.coefficients(gram.cpu(), order.cpu()).to(DEVICE)
    assert coefficients is not None
    assert torch.allclose(coefficients, expected, rtol=1e-11, atol=1e-12)
    check_rows(torch.cat(out), reference.combine(rows, weights), weights, rows)


@pytest.mark.parametrize("offset", [0, 1])
def test_several_tiles_of_rows(offset: int) -> None:
    tasks, widths = 33, (66, 5)
    rows, weights = random_rows(tasks, sum(widths)), random_weights(1, tasks)
    blocks, rows = without(scattered(rows, widths, offset), rows, [(0, 1), (32, 0)])
    check_gram(backend.gram_blocks(blocks, None, 1)[0], rows)
    out = new_out(blocks, offset)
    backend.combine_blocks(blocks, weights, None, out)
    check_rows(torch.cat(out), reference.combine(rows, weights[0]), weights[0], rows)


@pytest.mark.parametrize(("tasks", "scale"), [(3, 1e-30), (3, 1e18), (13, 1e-25)])
def test_squares_that_fp32_does_not_hold(tasks: int, scale: float) -> None:
    """Of one task they are within range, and another has no gradient of some block."""
    widths = WIDTHS if tasks < 9 else FEW
    rows = random_rows(tasks, sum(widths))
    rows[1:] *= scale
    blocks, rows = without(scattered(rows, widths), rows, [(2, 0), (0, 2)])
    check_gram(backend.gram_blocks(blocks, None, 1)[0], rows)


@pytest.mark.parametrize("tasks", [3, 13])
def test_what_is_absent_meets_no_inf(tasks: int) -> None:
    rows = random_rows(tasks, 600)
    rows[1, 7] = torch.inf
    blocks, _ = without(scattered(rows, [600]), rows, [(0, 0)])
    gram = backend.gram_blocks(blocks, None, 1)[0]
    assert not gram[0].any()
    assert not gram[1, 1:].isfinite().any() and gram[2:, 2:].isfinite().all()


def test_blocks_of_several_problems_in_any_order() -> None:
    rows = random_rows(4, sum(WIDTHS))
    blocks, owners = scattered(rows), [2, 0, 1, 2, -1]
    grams = backend.gram_blocks(blocks, owners, 4)
    parts = rows.split(list(WIDTHS), dim=1)
    for problem in range(4):
        own = [part for part, owner in zip(parts, owners, strict=True) if owner == problem]
        check_gram(grams[problem], torch.cat([rows[:, :0], *own], dim=1))
    weights, out = random_weights(3, 4), new_out(blocks)
    out_of_last = out[-1].fill_(7.0).clone()
    backend.combine_blocks(blocks, weights, owners, out)
    for part, owner, merged in zip(parts, owners, out, strict=True):
        if owner >= 0:
            check_rows(merged, reference.combine(part, weights[owner]), weights[owner], part)
    assert torch.equal(out[-1], out_of_last)


@pytest.mark.parametrize(("weight", "scale"), [(1e-60, 1e37), (1e45, 1e-37)])
def test_weights_beyond_fp32s_range_in_one_of_two_problems(weight: float, scale: float) -> None:
    rows = random_rows(2, 1500) * scale
    blocks = scattered(rows, (700, 800))
    weights = torch.tensor([[weight, -2 * weight], [1.0, 0.5]], dtype=FP64, device=DEVICE)
    out = new_out(blocks)
    backend.combine_blocks(blocks, weights, [0, 1], out)
    for own, part, merged in zip(weights, rows.split([700, 800], dim=1), out, strict=True):
        check_rows(merged, reference.combine(part, own), own, part)


def test_the_merged_gradient_may_take_a_rows_place() -> None:
    rows, weights = random_rows(5, sum(WIDTHS)), random_weights(1, 5)
    blocks = scattered(rows)
    backend.combine_blocks(blocks, weights, None, blocks.tensors[3])
    merged = torch.cat([part for part in blocks.tensors[3] if part is not None])
    check_rows(merged, reference.combine(rows, weights[0]), weights[0], rows)


def test_a_surgery_copies_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    def recorded(tensor: Tensor, device: torch.device, constant: bool = False) -> Tensor:
        copied.append(constant)
        return tensor.to(device)

    monkeypatch.setattr(_ops, "to_device", recorded)
    blocks = scattered(random_rows(3, sum(WIDTHS)))
    backend.pcgrad_blocks(blocks, random_order(3), Guards(), 1.0, new_out(blocks))()
    assert copied == [True]


def test_partial_grams_of_many_small_blocks_take_no_more_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpcgrad.backends.triton import tables

    rows, widths = random_rows(3, 64), [2] * 32
    blocks, made = scattered(rows, widths), tables._table
    tabled: list[int] = []

    def recorded(*arguments: Any) -> Any:
        tabled.append(1)
        return made(*arguments)

    monkeypatch.setattr(tables, "_table", recorded)
    for largest, expected in ((32 * 6 * 8, 1), (32 * 6 * 8 - 1, 0)):
        tabled.clear()
        monkeypatch.setattr(tables, "_LARGEST_PARTIALS", largest)
        check_gram(backend.gram_blocks(blocks, None, 1)[0], rows)
        assert len(tabled) == expected
        size = backend.workspace_nbytes(3, widths, FP32, 1)
        assert size > largest if expected else size < largest + 32 * 9 * 8 + 500


def test_a_capture_keeps_the_table_in_arguments_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And neither packs rows nor copies what would be read again at each replay."""
    kept, keep = [], _ops._kept_by_graph

    def recorded(tensor: Tensor, device: torch.device) -> Tensor:
        kept.append(tensor.numel())
        return keep(tensor, device)

    monkeypatch.setattr(_ops, "is_captured", lambda device: True)
    monkeypatch.setattr(_ops, "_kept_by_graph", recorded)
    monkeypatch.setattr(stacked, "_pack", None)
    rows, order = random_rows(3, sum(WIDTHS)), random_order(3)
    blocks, rows = without(scattered(rows), rows, [(0, 1), (2, 3)])
    out = new_out(blocks)
    gram, weights, *_ = backend.pcgrad_blocks(blocks, order, Guards(), 1.0, out)()
    assert len(kept) == 1 and kept[0] > 3 * 4
    check_gram(gram, rows)
    check_rows(torch.cat(out), reference.combine(rows, weights), weights, rows)
