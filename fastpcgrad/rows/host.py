"""Rows in host memory while the parameters lie on a GPU."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._memory import prefer_huge_pages
from .._ops import flat

IN_FLIGHT = 256 << 20
"""Bytes of gradients that may wait on the GPU for their copy; where backward is faster than the bus, it has to wait."""
_ALIGNMENT = 64  # bytes
_PORTABLE = 1  # cudaHostRegisterPortable


class Event(Protocol):
    """Something that will have happened."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Copies(Protocol):
    """How tensors get from a device to the host and back, beside the computation."""

    def lock(self, memory: Tensor) -> None:
        """Make host memory fit for asynchronous copies, for as long as it lives."""

    def staging(self, like: Tensor) -> Tensor:
        """New host memory, fit for asynchronous copies."""

    def to_host(self, source: Tensor, target: Tensor) -> Event:
        """Begin a copy, in turn; ``source`` may be dropped at once, ``target`` is there after the event."""

    def to_device(self, source: Tensor) -> Tensor:
        """A copy on the device, in turn: it sees what earlier copies brought, later ones do not disturb it."""

    def join(self) -> None:
        """Let the device compute on only when all copies to the host are through."""

    def settle(self) -> None:
        """Wait until all copies are through, those to the device too: the host may write where they read."""


class CudaCopies:
    """Copies between a GPU and page-locked host memory, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def lock(self, memory: Tensor) -> None:
        # torch's own pinned allocator rounds up to a power of two, which could double the rows.
        result = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)
        torch.cuda.check_error(int(result))
        # The end of the process unlocks all there is.
        weakref.finalize(memory, _unlock, memory.data_ptr(), self._stream).atexit = False

    def staging(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, pin_memory=True)

    def to_host(self, source: Tensor, target: Tensor) -> Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            flat(target).copy_(flat(source), non_blocking=True)
            event: Event = self._stream.record_event()
        source.record_stream(self._stream)
        return event

    def to_device(self, source: Tensor) -> Tensor:
        self.join()
        result = torch.empty_like(source, device=self._device)
        flat(result).copy_(flat(source), non_blocking=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return result

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def settle(self) -> None:
        self._stream.synchronize()


def _unlock(address: int, stream: torch.cuda.Stream) -> None:
    stream.synchronize()
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))


def copies_for(device: torch.device, row_device: torch.device | str | None) -> Copies | None:
    """What brings the gradients of parameters on ``device`` to rows on ``row_device``; None where they lie there.

    Raises:
        ValueError: rows cannot lie there.
    """
    if row_device is None:
        return None
    try:
        wanted = torch.device(row_device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"row_device must be None or a device; found {row_device!r}: {error}") from error
    if wanted.type == device.type and (wanted.type == "cpu" or wanted.index in (None, device.index)):
        return None
    if wanted.type == "cpu" and device.type == "cuda":
        return CudaCopies(device)
    raise ValueError(
        f"row_device must be None, the parameters' own device, or 'cpu' for parameters on a CUDA device; "
        f"found {str(wanted)!r} for parameters on {str(device)!r}"
    )


def check_one_kind(devices: Collection[torch.device], dtypes: Collection[torch.dtype]) -> None:
    """ValueError unless all rows that are to lie in host memory come from one device and have one dtype."""
    for name, found, remedy in (("devices", devices, ""), ("dtypes", dtypes, ": choose one with row_dtype")):
        if len(set(found)) > 1:
            listed = ", ".join(sorted(set(map(str, found))))
            raise ValueError(f"row_device must be None for rows of several {name}{remedy}; found {listed}")


class _Place(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    start: int


class _Copy(NamedTuple):
    done: Event
    nbytes: int
    staged: Tensor | None
    target: Tensor


class HostRows:
    """Memory for rows on the host, filled by copies that run beside the computation.

    A task's row is one piece of page-locked memory, made when the task first comes and kept from round to round,
    because locking takes longer than a step.

    Args:
        parameters: whose gradients are the rows' blocks.
        strides: of each block, dense.
        dtype: of the rows.
        copies: does the copying.
    """

    def __init__(
        self, parameters: Sequence[Tensor], strides: Sequence[tuple[int, ...]], dtype: torch.dtype, copies: Copies
    ) -> None:
        self._dtype, self._copies = dtype, copies
        self._places: list[_Place] = []
        self._width = 0
        for p, stride in zip(parameters, strides, strict=True):
            self._places.append(_Place(p.shape, stride, self._width))
            self._width += row_width(p.numel(), dtype)
        self._rows: dict[int, Tensor] = {}
        self._queue: deque[_Copy] = deque()
        self._queued = 0
        self._additions = 0
        self.at_risk = False
        """Whether something is being added to a place: where that was cut off, nobody knows whether it was."""

    def copy(self, task: int, index: int, grad: Tensor) -> Tensor:
        """Begin to copy a dense gradient, of any dtype, to its place in a task's row; gives the place."""
        if self._additions:  # one of a stay that failed may be for this place
            self.wait()
        target = self._place(task, index)
        self._begin(grad, target, None)
        return target

    def place(self, task: int, row: Sequence[Tensor | None]) -> list[Tensor | None]:
        """A task's row, which lies elsewhere in the host's memory, in its place."""
        self.wait()
        self._copies.settle()
        return [None if own is None else self._place(task, index).copy_(own) for index, own in enumerate(row)]

    def add(self, target: Tensor, grad: Tensor) -> None:
        """Begin to add a dense gradient, of any dtype, to what is in a place."""
        self._additions += 1  # first: where the rest is cut off, one too many costs a wait
        self._begin(grad, target, self._copies.staging(target))

    def fetch(self, place: Tensor) -> Tensor:
        """What is, or will be, in a place, on the device."""
        if self._additions:
            self.wait()
        return self._copies.to_device(place)

    def join(self) -> None:
        """What the device computes from here on may overwrite the gradients that were given."""
        self._copies.join()

    def wait(self) -> None:
        """Wait until all is in its place."""
        self._finish(-1)
        self._queued = self._additions = 0

    def forget(self) -> None:
        """What was given is of no use any more; the places are for other gradients."""
        self.wait()
        self.at_risk = False

    def _place(self, task: int, index: int) -> Tensor:
        shape, stride, start = self._places[index]
        row = self._row(task)
        return row.as_strided(shape, stride, row.storage_offset() + start)

    def _row(self, task: int) -> Tensor:
        if task not in self._rows:
            row = _whole_pages(self._width * self._dtype.itemsize).view(self._dtype)
            if row.numel():
                self._copies.lock(row)
            self._rows[task] = row
        return self._rows[task]

    def _begin(self, grad: Tensor, target: Tensor, staged: Tensor | None) -> None:
        source = grad
        if grad.dtype != target.dtype or grad.stride() != target.stride():
            source = torch.empty_strided(grad.shape, target.stride(), dtype=target.dtype, device=grad.device)
            source.copy_(grad)
        done = self._copies.to_host(source, target if staged is None else staged)
        self._queue.append(_Copy(done, source.nbytes, staged, target))
        self._queued += source.nbytes
        self._finish(IN_FLIGHT)

    def _finish(self, limit: int) -> None:
        """Wait for the oldest copies, as long as more than ``limit`` bytes are on their way."""
        while self._queue and self._queued > limit:
            done, nbytes, staged, target = self._queue[0]
            done.synchronize()
            self.at_risk = staged is not None
            self._queue.popleft()
            self._queued -= nbytes
            if staged is not None:
                target.add_(staged)
                self._additions -= 1
                self.at_risk = False


def _whole_pages(nbytes: int) -> Tensor:
    """New memory of at least so many bytes that shares no page with other memory: pages are what is locked.

    Its storage begins with the first page, which is where torch looks when it is asked whether a tensor is pinned.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return prefer_huge_pages(torch.frombuffer(pages, dtype=torch.uint8))


def row_width(width: int, dtype: torch.dtype) -> int:
    """Elements of a row that a block of so many takes: each begins where copies and kernels like it."""
    step = _ALIGNMENT // dtype.itemsize
    return -(-width // step) * step
