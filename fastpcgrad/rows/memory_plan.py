"""MemoryPlan: what a round takes, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from .. import backends
from .._gradients import gradient_dtype, gradient_nbytes
from .._warnings import FastPCGradWarning, warn
from .host import IN_FLIGHT, row_width

_MATRICES = 4
"""Of T×T that there are of a problem: G, C, and the orders of the projections, which are put together from others where
no generator of torch's draws them."""
_GRAMS_OF_PIECE = 3
"""That two phases keep: of parameters that all tasks touch, that some do, and that are summed."""


class MemoryPlanWarning(FastPCGradWarning):
    """A round would take more memory than is free."""


@dataclass(frozen=True)
class MemoryUse:
    """What is there of a round in one device's memory when that is most, beyond model and activations, in bytes.

    The parts are those of that moment, and add up to ``total``: what comes or goes at another moment is in none of
    them. So there are all rows and the workspace, or all but the last row and the sums that become it.

    Attributes:
        device: whose memory.
        free: what could be allocated when the plan was made; None: unknown.
        rows: of the T rows, or in two phases of the T gradients of a piece.
        merged: the merged gradient where it is not one of the rows.
        accumulation: the sums of one stay in a task before they are rounded to its row.
        transient: gradients on their way to a row, beside it.
        workspace: what the surgery itself works with: partial sums and tables of the backend that will run it, and G, C
            and the orders of each problem. For parameters on the meta device, of which no backend is known, 0.
    """

    device: torch.device
    free: int | None
    rows: int = 0
    merged: int = 0
    accumulation: int = 0
    transient: int = 0
    workspace: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Those that are there, by name."""
        names = ("rows", "merged", "accumulation", "transient", "workspace")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def total(self) -> int:
        """The sum of the parts: the most that is there at once."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {_readable(count)}" for name, count in self.parts.items())
        free = "unknown" if self.free is None else _readable(self.free)
        return f"{self.device}: {_readable(self.total)} at once ({listed or 'nothing'}); free: {free}"


@dataclass(frozen=True)
class MemoryPlan:
    """What a round of T tasks takes, as far as it is known before: an upper bound.

    Numbers are counted, not the objects that hold them: torch takes almost half a KiB of host memory for each gradient
    of a task, which is much only where there are many tasks of many tiny parameters. Nor is what a method takes to
    solve a problem for itself.

    Attributes:
        device: of the parameters' device; of the first one, where there are several.
        host: of host memory, where the rows lie there and the parameters do not; else None.
        others: of the parameters' other devices.
    """

    device: MemoryUse
    host: MemoryUse | None = None
    others: tuple[MemoryUse, ...] = ()

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
        return [self.device, *self.others, *(() if self.host is None else (self.host,))]

    def __str__(self) -> str:
        return "\n".join(map(str, self._uses))


def plan_memory(
    tasks: int,
    parameters: Sequence[Tensor],
    row_dtypes: Sequence[torch.dtype],
    *,
    moved: bool,
    accumulate_dtype: torch.dtype | None,
    on_host: bool,
    problems: int,
) -> MemoryPlan:
    """The plan for T rows.

    Args:
        row_dtypes: of each parameter's rows.
        moved: whether rows are copies (``moved_gradients``), not what autograd left.
        accumulate_dtype: see ``MovedGradients``.
        on_host: whether they lie in host memory and the parameters do not.
        problems: how many are solved.
    """
    first, *others = dict.fromkeys(p.device for p in parameters) or [torch.device("cpu")]
    if others:
        uses = []
        for device in (first, *others):
            own = [(p, dtype) for p, dtype in zip(parameters, row_dtypes, strict=True) if p.device == device]
            some, dtypes = zip(*own, strict=True)
            plan = plan_memory(
                tasks, some, dtypes, moved=moved, accumulate_dtype=accumulate_dtype, on_host=on_host, problems=problems
            )
            uses.append(plan.device)
        return MemoryPlan(uses[0], others=tuple(uses[1:]))
    device = first
    widths, use = [p.numel() for p in parameters], partial(MemoryUse, device, free_memory(device))
    if not widths:
        return MemoryPlan(use())
    stored = [width * dtype.itemsize for width, dtype in zip(widths, row_dtypes, strict=True)]
    row, host = sum(stored), torch.device("cpu")
    figures = _matrices_nbytes(device, tasks, _MATRICES * problems)
    workspace = figures + _kernels_nbytes(host if on_host else device, tasks, widths, row_dtypes, problems)
    if not moved:
        return MemoryPlan(use(rows=tasks * row, workspace=workspace))
    largest, largest_stored = max(gradient_nbytes(p) for p in parameters), max(stored)
    sums = 0 if accumulate_dtype is None else sum(widths) * accumulate_dtype.itemsize
    if not on_host:
        filled, beside = ((tasks - 1) * row, max(largest, largest_stored)) if sums else (tasks * row, largest)
        rows_left, merged = _giving(tasks, parameters, row_dtypes)
        return MemoryPlan(
            _most(
                use(rows=filled, accumulation=sums, transient=beside),
                use(rows=tasks * row, workspace=workspace),
                use(rows=rows_left, merged=merged, workspace=figures),
            )
        )
    row_dtype = row_dtypes[0]  # rows in host memory have one
    converted = any(gradient_dtype(p) != row_dtype for p in parameters)
    waiting = min(row, IN_FLIGHT + largest_stored)
    sending = use(accumulation=sums, transient=waiting + (largest if converted or sums else 0))
    bringing_back = use(
        merged=sum(gradient_nbytes(p) for p in parameters), transient=largest_stored if converted else 0
    )
    # What micro-batches add to rows comes through torch's page-locked memory, which is rounded up to powers of two and
    # kept.
    staged = 0 if sums else 2 * waiting
    rows = tasks * sum(row_width(width, row_dtype) for width in widths) * row_dtype.itemsize
    return MemoryPlan(
        _most(sending, bringing_back),
        MemoryUse(host, free_memory(host), rows=rows, transient=staged, workspace=workspace),
    )


def plan_sharded(
    tasks: int,
    parameters: Sequence[Tensor],
    row_dtypes: Sequence[torch.dtype],
    widths: Sequence[int],
    *,
    whole: int,
    most_held: tuple[int, int],
    largest: int,
    buckets: int,
    problems: int,
) -> MemoryPlan:
    """The plan for the shards of T rows.

    Args:
        parameters: of one device.
        row_dtypes: of each parameter's rows.
        widths: the columns of each that this process has.
        whole: bytes of one task's gradient before it is reduced, and of the merged one.
        most_held: how many of the former there are at most, and how many rows beside these.
        largest: bytes of the largest gradient, which is copied where it lies in another order than its parameter.
        buckets: bytes of those that are on their way.
        problems: how many are solved.
    """
    device = _device_of(parameters)
    use = partial(MemoryUse, device, free_memory(device))
    row = sum(width * dtype.itemsize for width, dtype in zip(widths, row_dtypes, strict=True))
    figures = _matrices_nbytes(device, tasks, _MATRICES * problems)
    workspace = figures + (_kernels_nbytes(device, tasks, widths, row_dtypes, problems) if widths else 0)
    return MemoryPlan(
        _most(
            use(rows=most_held[1] * row, transient=most_held[0] * whole + largest + buckets),
            use(rows=tasks * row, transient=whole + largest + buckets),
            use(rows=tasks * row, merged=whole, transient=buckets, workspace=figures),
            use(rows=tasks * row, transient=buckets, workspace=workspace),
        )
    )


def plan_two_phase(tasks: int, parameters: Sequence[Tensor]) -> MemoryPlan:
    """The plan for T pieces at a time, each of the size that ``two_phase`` aims at, and then the merged gradient."""
    device = _device_of(parameters)
    widths, use = [p.numel() for p in parameters], partial(MemoryUse, device, free_memory(device))
    if not widths:
        return MemoryPlan(use())
    size, largest = sum(gradient_nbytes(p) for p in parameters), max(gradient_nbytes(p) for p in parameters)
    dtype = max(map(gradient_dtype, parameters), key=attrgetter("itemsize"))
    grams = _GRAMS_OF_PIECE * -(-sum(widths) // max(1, *widths, sum(widths) // tasks))
    figures = _matrices_nbytes(device, tasks, grams + _MATRICES)
    return MemoryPlan(
        _most(
            use(
                rows=max(size, tasks * largest),
                workspace=figures + _kernels_nbytes(device, tasks, widths, [dtype] * len(widths), _GRAMS_OF_PIECE),
            ),
            use(merged=size, workspace=figures + _kernels_nbytes(device, 1, widths, [dtype] * len(widths), grams)),
        )
    )


def plan_factored(tasks: int, parameters: Sequence[Tensor]) -> MemoryPlan:
    """The plan for matrices as factors, which count as activations, and T rows of everything else."""
    device, rest = _device_of(parameters), [p for p in parameters if p.dim() != 2]
    rows = tasks * sum(map(gradient_nbytes, rest))
    use = partial(MemoryUse, device, free_memory(device), rows=rows)
    merged = sum(map(gradient_nbytes, parameters)) - rows // tasks
    widths, dtypes = [p.numel() for p in rest], list(map(gradient_dtype, rest))
    kernels = _kernels_nbytes(device, tasks, widths, dtypes, 1) if rest else 0
    return MemoryPlan(use(merged=merged, workspace=_matrices_nbytes(device, tasks, _MATRICES) + kernels))


def _most(*moments: MemoryUse) -> MemoryUse:
    return max(moments, key=attrgetter("total"))


def _device_of(parameters: Sequence[Tensor]) -> torch.device:
    return parameters[0].device if parameters else torch.device("cpu")


def _matrices_nbytes(device: torch.device, tasks: int, count: int) -> int:
    return 0 if device.type == "meta" else 8 * count * tasks * tasks


def _kernels_nbytes(
    device: torch.device, tasks: int, widths: Sequence[int], dtypes: Sequence[torch.dtype], problems: int
) -> int:
    """What the backend that will run there takes at most: it has the blocks of one dtype after those of another."""
    if device.type == "meta":
        return 0
    backend = backends.for_tasks(backends.select(device.type), tasks)
    each = [[w for w, own in zip(widths, dtypes, strict=True) if own == dtype] for dtype in dict.fromkeys(dtypes)]
    pairs = zip(each, dict.fromkeys(dtypes), strict=True)
    return max(backend.workspace_nbytes(tasks, own, dtype, problems) for own, dtype in pairs)


def _giving(tasks: int, parameters: Sequence[Tensor], row_dtypes: Sequence[torch.dtype]) -> tuple[int, int]:
    """Rows and merged gradient where they are most while this one replaces those, parameter by parameter."""
    rows, merged = tasks * sum(p.numel() * own.itemsize for p, own in zip(parameters, row_dtypes, strict=True)), 0
    most = (rows, merged)
    for p, row_dtype in zip(parameters, row_dtypes, strict=True):
        row = p.numel() * row_dtype.itemsize
        rows -= (tasks - 1) * row
        if gradient_dtype(p) != row_dtype:
            merged += gradient_nbytes(p)
            most = max(most, (rows, merged), key=sum)
            rows -= row
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
