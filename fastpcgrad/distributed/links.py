"""Collectives over process groups, counted."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


def _first_of(*names: str) -> Any:
    """By the newest name that this torch has for it; None without collectives at all."""
    return next((found for name in names if (found := getattr(torch.distributed, name, None)) is not None), None)


_messengers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

_scatter_sum: Any = _first_of("reduce_scatter_single", "reduce_scatter_tensor")
_gather: Any = _first_of("all_gather_single", "all_gather_into_tensor")


class _PartOfSum:
    """How gloo sums and scatters: by an all-reduce. Its own does so with a copy, and does not say when it is done."""

    def __init__(self, part: Tensor, summed: Tensor, work: Any) -> None:
        self._part, self._summed, self._work = part, summed, work

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self) -> None:
        self._work.wait()
        self._part.copy_(self._summed)


class Lanes:
    """Groups of the same processes as others, for what is sent while a backward pass runs.

    That may send something through these others itself, as SyncBatchNorm does, and which of the two comes first need
    not be the same in all processes.
    """

    def __init__(self) -> None:
        self._beside: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def beside(self, group: Any) -> Any:
        """The one with the processes and the backend of a group; made once, by all of them together."""
        if group not in self._beside:
            self._beside[group] = _twin(group, torch.distributed.get_backend_config(group))
        return self._beside[group]


class Link:
    """Collectives over groups, one after the other, which together reach everybody; counts the bytes of each.

    Args:
        groups: process groups, in the same order in all processes: those of a mesh's dimensions, say.
    Attributes:
        lanes: through which ``scatter_sum`` goes; None: through the groups themselves.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        self.groups = groups
        self.lanes: Lanes | None = None
        self.nbytes = 0
        """What this process has handed to collectives so far; where each gets a part, without its own."""

    @property
    def size(self) -> int:
        """How many processes it reaches."""
        size = 1
        for group in self.groups:
            size *= torch.distributed.get_world_size(group)
        return size

    @property
    def rank(self) -> int:
        """Of this process, over one group."""
        return torch.distributed.get_rank(self.groups[0])

    def sum_(self, tensor: Tensor, groups: Sequence[Any] | None = None) -> Tensor:
        """The sum over all processes, in place; over those of some groups, where told so."""
        return self._reduce(tensor, self.groups if groups is None else groups, torch.distributed.ReduceOp.SUM)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, of a tensor outside of any graph."""
        return self.sum_(tensor.detach().clone(memory_format=torch.contiguous_format)).div_(self.size)

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest over all processes, in place."""
        return self._reduce(tensor, self.groups, torch.distributed.ReduceOp.MAX)

    def from_root_(self, tensor: Tensor) -> Tensor:
        """What the root has, in place."""
        for group in self.groups:
            self.nbytes += tensor.nbytes
            torch.distributed.broadcast(tensor, group=_carrier(group, tensor.device), group_src=0)
        return tensor

    def scatter_sum(self, part: Tensor, whole: Tensor) -> Any:
        """Of the sum over all processes of ``whole`` the part of this one, by its rank; over one group.

        Returns:
            what is to be waited for before ``part`` is read or ``whole`` is written; ``whole`` is lost.
        """
        self.nbytes += whole.nbytes * (self.size - 1) // self.size
        group = self.reducing(whole.device)
        if f"{whole.device.type}:gloo" in torch.distributed.get_backend_config(group):
            work = torch.distributed.all_reduce(whole, group=group, async_op=True)
            return _PartOfSum(part, whole[self.rank * len(part) :][: len(part)], work)
        return _scatter_sum(part, whole, group=group, async_op=True)

    def reducing(self, device: torch.device) -> Any:
        """The group through which ``scatter_sum`` reduces what is on a device. All ask for it together, first."""
        carrier = _carrier(self.groups[0], device)
        return carrier if self.lanes is None else self.lanes.beside(carrier)

    def exchange(self, received: Tensor, counts: list[int], sent: Tensor, sent_counts: list[int]) -> Any:
        """To each process its piece of ``sent``, by rank, and from each a piece of ``received``; over one group.

        Args:
            counts, sent_counts: how many elements come from each process, and go to each.
        Returns:
            what is to be waited for before ``received`` is read or ``sent`` is written.
        """
        self.nbytes += (len(sent) - sent_counts[self.rank]) * sent.itemsize
        group = _carrier(self.groups[0], sent.device)
        return torch.distributed.all_to_all_single(received, sent, counts, sent_counts, group=group, async_op=True)

    def gather(self, whole: Tensor, part: Tensor) -> None:
        """The parts of all processes one after the other, by rank, into ``whole``; over one group."""
        self.nbytes += whole.nbytes * (self.size - 1) // self.size
        _gather(whole, part, group=_carrier(self.groups[0], part.device))

    def _reduce(self, tensor: Tensor, groups: Sequence[Any], op: Any) -> Tensor:
        for group in groups:
            self.nbytes += tensor.nbytes
            torch.distributed.all_reduce(tensor, op=op, group=_carrier(group, tensor.device))
        return tensor


def groups_of(mesh: Any) -> list[Any]:
    """The process group of each dimension of a mesh, if there is somebody else along it."""
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]


def messenger(group: Any) -> Any:
    """A group of the same processes for messages on the host; made once for each, by all of its processes."""
    if group not in _messengers:
        _messengers[group] = _twin(group, "gloo")
    return _messengers[group]


def _twin(group: Any, backend: str) -> Any:
    """A group of the same processes, made by all of them together."""
    distributed = torch.distributed
    ranks, options = distributed.get_process_group_ranks(group), {}
    with suppress(Exception):  # not told by every backend
        options["timeout"] = group._get_backend(torch.device("cpu")).options._timeout
    return distributed.new_group(ranks, backend=backend, use_local_synchronization=True, **options)


def _carrier(group: Any, device: torch.device) -> Any:
    """The group, or where its backend knows no tensors of that device, as NCCL none on the host, its messenger."""
    known = torch.distributed.get_backend_config(group)  # such as cpu:gloo,cuda:nccl
    return group if f"{device.type}:" in known else messenger(group)
