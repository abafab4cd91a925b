"""MemoryPlan: what a round takes, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ._warnings import FastPCGradWarning, warn
from .host_rows import IN_FLIGHT, row_width


class MemoryPlanWarning(FastPCGradWarning):
    """A round would take more memory than is free."""


@dataclass(frozen=True)
class MemoryUse:
    """What a round takes of one device's memory, beyond model and activations, in bytes.

    Attributes:
        device: whose memory.
        rows: the T rows, or in two phases what there is of them at once.
        merged: the merged gradient where it is not one of the rows.
        accumulation: the sums of one stay in a task before they are rounded to its row.
        transient: gradients on their way to a row, beside it.
        total: the most that is there at once. Less than the sum: sums become a row, merged gradients replace rows.
        free: what could be allocated when the plan was made; None: unknown.
    """

    device: torch.device
    rows: int
    merged: int
    accumulation: int
    transient: int
    total: int
    free: int | None

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("rows", "merged", "accumulation", "transient")}
        listed = ", ".join(f"{name} {_readable(count)}" for name, count in parts.items() if count)
        free = "unknown" if self.free is None else _readable(self.free)
        return f"{self.device}: {_readable(self.total)} at once ({listed or 'nothing'}); free: {free}"


@dataclass(frozen=True)
class MemoryPlan:
    """What a round of T tasks takes, as far as it is known before: an upper bound.

    Attributes:
        device: of the parameters' device.
        host: of host memory, where the rows lie there and the parameters do not; else None.
    """

    device: MemoryUse
    host: MemoryUse | None = None

    @property
    def total(self) -> int:
        """Bytes on device and host."""
        return sum(use.total for use in self._uses)

    def warn(self) -> None:
        """MemoryPlanWarning where more is needed than is free."""
        for use in self._uses:
            if use.free is not None and use.total > use.free:
                warn(f"gradient surgery needs more memory than is free: {use}", MemoryPlanWarning)

    @property
    def _uses(self) -> list[MemoryUse]:
        return [self.device] if self.host is None else [self.device, self.host]

    def __str__(self) -> str:
        return "\n".join(map(str, self._uses))


def plan_memory(
    tasks: int,
    parameters: Sequence[Tensor],
    row_dtype: torch.dtype,
    *,
    moved: bool,
    accumulate_dtype: torch.dtype | None,
    on_host: bool,
) -> MemoryPlan:
    """The plan for T rows.

    Args:
        moved: whether rows are copies (``moved_gradients``), not what autograd left.
        accumulate_dtype: see ``MovedGradients``.
        on_host: whether they lie in host memory and the parameters do not.
    """
    device = parameters[0].device if parameters else torch.device("cpu")
    widths, free = [p.numel() for p in parameters], free_memory(device)
    row = sum(widths) * row_dtype.itemsize
    if not moved:
        return MemoryPlan(MemoryUse(device, tasks * row, 0, 0, 0, tasks * row, free))
    grads = [p.nbytes for p in parameters]
    largest, largest_stored = max(grads, default=0), max(widths, default=0) * row_dtype.itemsize
    sums = 0 if accumulate_dtype is None else sum(widths) * accumulate_dtype.itemsize
    converted = any(p.dtype != row_dtype for p in parameters)
    merged = sum(grads) if on_host else sum(p.nbytes for p in parameters if p.dtype != row_dtype)
    if not on_host:
        filled = (tasks - 1) * row + (sums or row) + largest
        total = max(filled, _merging(tasks, parameters, row_dtype))
        return MemoryPlan(MemoryUse(device, tasks * row, merged, sums, largest, total, free))
    waiting = min(row, IN_FLIGHT + largest_stored)
    sent = waiting + (largest if converted or sums else 0)
    total = max(sums + sent, merged + (largest_stored if converted else 0))
    rows = tasks * sum(row_width(width, row_dtype) for width in widths) * row_dtype.itemsize
    host = torch.device("cpu")
    # What micro-batches add to rows comes through torch's page-locked memory, which is rounded up to powers of two.
    staged = 0 if sums else 2 * waiting
    return MemoryPlan(
        MemoryUse(device, 0, merged, sums, sent, total, free),
        MemoryUse(host, rows, 0, 0, staged, rows + staged, free_memory(host)),
    )


def plan_two_phase(tasks: int, parameters: Sequence[Tensor]) -> MemoryPlan:
    """The plan for T pieces at a time, each of the size that ``two_phase`` aims at, and then the merged gradient."""
    device = parameters[0].device if parameters else torch.device("cpu")
    sizes = [p.nbytes for p in parameters]
    pieces, merged = max(sum(sizes), tasks * max(sizes, default=0)), sum(sizes)
    return MemoryPlan(MemoryUse(device, pieces, merged, 0, 0, max(pieces, merged), free_memory(device)))


def _merging(tasks: int, parameters: Sequence[Tensor], row_dtype: torch.dtype) -> int:
    """The most that is there while merged gradients replace the rows, parameter by parameter."""
    there = most = tasks * sum(p.numel() for p in parameters) * row_dtype.itemsize
    for p in parameters:
        row = p.numel() * row_dtype.itemsize
        there -= (tasks - 1) * row
        if p.dtype != row_dtype:
            most = max(most, there + p.nbytes)
            there += p.nbytes - row
    return most


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be allocated; None where that cannot be found out."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return next((1024 * count for count in kibibytes), None)


def _readable(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
