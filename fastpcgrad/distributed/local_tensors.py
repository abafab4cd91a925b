"""DTensors and what this process has of them: their rows are its local tensors, and of replicas one is counted."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._gradients import as_real, gradient_dtype
from .links import groups_of
from .live import live


def is_dtensor(tensor: Tensor) -> bool:
    """Whether other processes have parts or replicas of it. There is none where its module was never imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class Place(Protocol):
    """Which part of a parameter's rows this process has.

    Attributes:
        groups: those who have the other parts, or replicas; one after the other they reach all.
        counts: whether this process is the one of its replicas that counts in G.
        shard: which part it has: alike in all replicas of it, and in no others.
        where: in words, who else there is.
    """

    groups: tuple[Any, ...]
    counts: bool
    shard: tuple[int, ...]
    where: str


class Reducer(NamedTuple):
    """What of ``fully_shard`` reduces the gradients of one parameter, and of the others of its group."""

    own: weakref.ref[Any]
    group: weakref.ref[Any]

    def keeps(self) -> bool:
        """Whether there is a gradient that was not reduced, or not over all replicas."""
        own, group = self.own(), self.group()
        gathered = getattr(own, "_unsharded_param", None)
        kept = getattr(own, "unsharded_accumulated_grad", None), getattr(group, "_partial_reduce_output", None)
        return any(grad is not None for grad in (*kept, getattr(gathered, "grad", None)))


def reducers_of(parameters: Sequence[Tensor]) -> dict[int, Reducer]:
    """By the id of a parameter that ``fully_shard`` holds. Looks at all live objects, if there are any parameters."""
    wanted = set(map(id, parameters))
    return {
        id(own.sharded_param): Reducer(weakref.ref(own), weakref.ref(group))
        for _, group in (live({"FSDPParamGroup"}) if wanted else ())
        for own in vars(group).get("fsdp_params", ())
        if id(own.sharded_param) in wanted
    }


class LocalTensor:
    """The gradient of a DTensor as rows hold it: the part of this process, placed as the parameter is. A ``Place``.

    A gradient that is placed otherwise, as a partial sum is, is redistributed first.

    Args:
        parameter: a DTensor.
        reducer: what of ``fully_shard`` reduces its gradients, if anything.
    Raises:
        NotImplementedError: a parameter that is a partial sum, has gradients of another dtype, or lies on a mesh that
            this process is no part of.
    """

    def __init__(self, parameter: Any, reducer: Reducer | None = None) -> None:
        self._reducer = reducer
        self.mesh, self._placements = parameter.device_mesh, tuple(parameter.placements)
        self._shape, self._stride = parameter.shape, parameter.stride()
        self._parameter = parameter
        found = f"found a DTensor {list(self._shape)} with placements {self._placements} on {self.mesh}"
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise NotImplementedError(f"the mesh of a parameter must hold this process; {found}")
        if any(placement.is_partial() for placement in self._placements):
            raise NotImplementedError(f"a parameter must not be a partial sum; {found}")
        if gradient_dtype(parameter) != parameter.dtype:
            raise NotImplementedError(f"the gradient of a DTensor must have its dtype; {found} and another grad_dtype")
        along = list(zip(coordinate, self._placements, strict=True))
        self.counts = all(own == 0 for own, placement in along if placement.is_replicate())
        self.shard = tuple(own for own, placement in along if not placement.is_replicate())
        self.groups = tuple(groups_of(self.mesh))
        self.where = f"DTensors on {self.mesh}"

    def like_row(self) -> Tensor:
        return as_real(_local(self._parameter.detach()))

    def check(self) -> None:
        """RuntimeError where ``fully_shard`` has kept gradients that it has not reduced: they would come with those of
        another task."""
        if self._reducer is not None and self._reducer.keeps():
            raise RuntimeError(
                f"fully_shard has kept gradients of a parameter {list(self._shape)} as they were, after "
                "set_requires_gradient_sync(False) or set_requires_all_reduce(False), and would add them to those of "
                "the next task: switch it on before the last backward pass of each task"
            )

    def into_row(self, grad: Any) -> Tensor:
        if not is_dtensor(grad):
            raise TypeError(f"the gradient of a DTensor must be one; found a {type(grad).__name__} {list(grad.shape)}")
        if grad.device_mesh != self.mesh or tuple(grad.placements) != self._placements:
            with torch.no_grad():
                grad = grad.detach().redistribute(self.mesh, self._placements)
        return as_real(_local(grad))

    def out_of_row(self, own: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        local = torch.view_as_complex(own) if self._parameter.is_complex() else own
        with torch.no_grad():
            return DTensor.from_local(
                local, self.mesh, self._placements, run_check=False, shape=self._shape, stride=self._stride
            )


class Part:
    """What a process keeps of the rows of a parameter that it shares with the others of a group. A ``Place``.

    Args:
        group: of the processes.
    """

    counts = True

    def __init__(self, group: Any) -> None:
        self.groups: tuple[Any, ...] = (group,)
        self.shard: tuple[int, ...] = (torch.distributed.get_rank(group),)
        self.where = f"means over {torch.distributed.get_world_size(group)} processes"


@torch.no_grad()
def _local(tensor: Any) -> Tensor:
    local: Any = tensor.to_local()
    return local.trigger_wait() if hasattr(local, "trigger_wait") else local  # it may still be on its way
