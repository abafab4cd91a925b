"""Who holds a parameter for several processes, and what is refused because of that.

Few parameters say that other processes hold a part of them, and none says that a module averages its gradient with
theirs. Who holds a parameter is found among all live objects instead, once, in tenths of a second. So a module that is
wrapped after the first round is not seen, nor is one that ``gc.freeze()`` has set aside.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from .._graph import leaves
from .._warnings import warn_once
from .links import groups_of
from .live import live
from .local_tensors import is_dtensor

Choice = Literal["auto", "local"]

Replicas = frozenset["weakref.ref[Any]"]
"""Modules that average the gradient of a parameter over processes."""

_REPLICA = "DistributedDataParallel"
_SHARDERS = {
    "FSDPParam": "fully_shard, which a forward pass has gathered: take the parameters that the optimizer has, those of "
    "the model before its forward pass",
    "DeepSpeedEngine": "DeepSpeed",
    "_PipelineStageBase": "torch.distributed.pipelining, which runs the backward passes itself",
}
"""Who holds parameters of which a process has a part only, at least between the steps.

All by the names of their classes: these move from module to module, are imported late, or belong to other packages.
"""

REMEDY = (
    "gradient surgery covers the DTensors of fully_shard, distribute_module and parallelize_module, by "
    "PCGrad.pc_backward, inside 'with surgery.task(t)' of GradientSurgery and by surgery.backward; no others"
)

_OF_NORMS = (
    "Give GradNorm.note(task, loss, norm) the norms of averaged gradients, and losses that are averaged over the "
    "processes, so that all come to the same weights; process_group='local' balances by what this process alone saw"
)

NO_REPLICAS: Replicas = frozenset()
_replicas_of: Any = WeakTensorKeyDictionary()
"""By each parameter that was looked up for a call that keeps nothing: its replicas."""
_replicas_behind: Any = WeakTensorKeyDictionary()
"""By the parameter nearest to shared features: the replicas of all parameters that these depend on."""


def check_process_group(value: object) -> Any:
    """Whose gradients are merged: ``auto``, which None means too, ``local``, or those of a process group.

    Args:
        value: those, or a device mesh of one dimension.
    Raises:
        TypeError, ValueError: anything else; the message shows what was found.
    """
    if isinstance(value, str | None):
        if value in ("auto", "local", None):
            return value or "auto"
        raise ValueError(f"process_group must be 'auto' or 'local', a process group or a mesh; found {value!r}")
    distributed = torch.distributed
    if isinstance(value, getattr(distributed, "DeviceMesh", ())):
        mesh: Any = value
        if mesh.ndim != 1:
            raise ValueError(f"process_group must be a mesh of one dimension, such as mesh['data']; found {mesh}")
        return mesh.get_group()
    if isinstance(value, getattr(distributed, "ProcessGroup", ())):
        return value
    raise TypeError(f"process_group must be 'auto' or 'local', a process group or a mesh; found {type(value).__name__}")


def check_groups(value: object) -> Choice | list[Any]:
    """Whose batches form one: ``auto`` and ``local`` as in ``check_process_group``, or groups.

    Args:
        value: those two, None for ``auto``, a process group or a device mesh, whose dimensions all count.
    Raises:
        TypeError, ValueError: anything else; the message shows what was found.
    """
    distributed = torch.distributed
    if isinstance(value, getattr(distributed, "DeviceMesh", ())):
        return groups_of(value)
    if isinstance(value, getattr(distributed, "ProcessGroup", ())):
        assert isinstance(value, distributed.ProcessGroup)
        return [value] if distributed.get_world_size(value) > 1 else []
    choice: Choice = check_process_group(value)
    return choice


def check_graph(tensors: Sequence[Tensor], process_group: object) -> None:
    """Before ``torch.autograd.grad``, in a call that keeps nothing.

    Args:
        tensors: all leaves of the graph, and what else the gradients are taken of.
        process_group: see ``check_process_group``.
    Raises, Warns:
        see ``Processes.check``; also for ``static_graph``.
    """
    choice = check_process_group(process_group)
    refuse_sharded(tensors)
    if not is_initialized():
        return
    replicas = remembered(tensors)
    check_replicas(replicas, choice)
    if module := blamed(replicas, has_static_graph):
        raise static_graph_refused(module)


def check_layer(layer: Sequence[Tensor], process_group: object) -> None:
    """Before norms of the task gradients at a layer are taken: parameters, or what is computed from some.

    Raises, Warns:
        see ``check_graph``.
    """
    choice = check_process_group(process_group)
    features = [z for z in layer if not z.is_leaf]
    if features and is_initialized():
        check_replicas(_found_behind(features), choice)
    check_graph(layer, choice)


def groups_behind(features: Sequence[Tensor], chosen: Choice | list[Any]) -> list[Any]:
    """The groups over which the gradients of all parameters are averaged that ``features`` depend on.

    Args:
        chosen: see ``check_groups``: groups are those, and with ``local`` there are none.
    Raises:
        NotImplementedError: sharded parameters, or several modules that average over different groups.
    Warns:
        FastPCGradWarning: see ``Processes.check``.
    """
    if isinstance(chosen, list) or not is_initialized():
        return chosen if isinstance(chosen, list) else []
    replicas = _found_behind(features)
    if chosen == "local":
        return []
    blamed(replicas, averages)  # which collects modules that are gone
    averaging = [module for reference in replicas if (module := reference()) is not None and averages(module)]
    groups = {id(group): group for group in map(group_of, averaging)}
    if len(groups) > 1:
        raise NotImplementedError(
            f"parameters are averaged over {len(groups)} different process groups: pass the one of the batch as "
            "process_group"
        )
    if not groups:
        check_replicas(replicas, chosen)
    return list(groups.values())


def _found_behind(features: Sequence[Tensor]) -> Replicas:
    """The replicas of all parameters that ``features`` depend on; NotImplementedError for sharded ones.

    In a training loop they are other tensors in each step. As long as the parameter nearest to each is the same, they
    are taken to depend on the same others: the graph is walked in the first step only.
    """
    nearest = [next((p for p in leaves([z], hidden=True) if isinstance(p, Parameter)), None) for z in features]
    if all(p is not None and not is_stale(_replicas_behind.get(p)) for p in nearest):
        return NO_REPLICAS.union(*map(_replicas_behind.__getitem__, nearest))
    behind = list(leaves(features, hidden=True))
    refuse_sharded([*features, *behind])
    replicas = remembered(behind)
    _replicas_behind.update((p, replicas) for p in nearest if p is not None)
    return replicas


is_initialized: Callable[[], bool] = torch.distributed.is_initialized if torch.distributed.is_available() else bool
"""Whether this process has others beside it."""


def refuse_sharded(tensors: Iterable[Tensor]) -> None:
    """NotImplementedError for what says itself that this process has a part of it only."""
    if "torch.distributed.tensor" not in sys.modules and not is_initialized():  # no shards without either
        return
    for tensor in tensors:
        shape = list(tensor.shape)
        if is_dtensor(tensor):
            placed: Any = tensor
            raise NotImplementedError(
                f"found a DTensor {shape} with placements {placed.placements} on {placed.device_mesh}: {REMEDY}"
            )
        if hasattr(tensor, "_st_info"):  # what DistributedDataParallel puts in the place of a DTensor
            raise NotImplementedError(f"found the local part {shape} of a DTensor: {REMEDY}")
        if getattr(tensor, "_fsdp_flattened", False):
            raise NotImplementedError(f"found a parameter {shape} of FullyShardedDataParallel: {REMEDY}")


def check_replicas(replicas: Replicas, choice: Choice, *, is_warned: bool = True) -> None:
    """With ``auto``, that no module averages the gradients; a warning where there are several processes without one."""
    if choice == "local":
        return
    if module := blamed(replicas, averages):
        raise NotImplementedError(
            f"{name_of(module)} averages the gradients of these parameters over {processes_of(module)} processes, and "
            f"the norms of task gradients are not. {_OF_NORMS}"
        )
    processes = torch.distributed.get_world_size()
    if processes > 1 and is_warned:
        warn_once(
            f"each of the {processes} processes takes the task gradients of its own batch by itself, and no "
            "DistributedDataParallel holds these parameters: wrap the model before its first round, or pass "
            "process_group='local' if that is meant"
        )


def remembered(tensors: Iterable[Tensor]) -> Replicas:
    """The replicas of all of them. Modules hold nothing but parameters, so that no other leaf is looked up."""
    parameters = [p for p in tensors if isinstance(p, Parameter)]
    unknown = [p for p in parameters if is_stale(_replicas_of.get(p))]
    if unknown:
        _replicas_of.update(zip(unknown, look_up(unknown), strict=True))
    return NO_REPLICAS.union(*map(_replicas_of.__getitem__, parameters))


def is_stale(replicas: Replicas | None) -> bool:
    """Whether parameters were never looked up, or one that held them is gone, and another may have taken its place."""
    return any(reference() is None for reference in replicas) if replicas else replicas is None


def look_up(parameters: Sequence[Tensor]) -> list[Replicas]:
    """The replicas of each parameter; NotImplementedError for one that is sharded and does not say so itself.

    Such are the parameters that a forward pass gathers: plain ones, which are the leaves of the graph and at times the
    module's, while the optimizer has the shards.
    """
    owners: dict[int, set[weakref.ref[Any]]] = {id(p): set() for p in parameters}
    for name, holder in _holders():
        values = list(vars(holder).values())
        modules = [module for module in (holder, *values) if isinstance(module, torch.nn.Module)]
        ignored = getattr(holder, "parameters_to_ignore", ())
        held = [*values, *(p for module in modules for name, p in module.named_parameters() if name not in ignored)]
        for p in held:
            if id(p) not in owners:
                continue
            if name in _SHARDERS:
                raise NotImplementedError(f"found a parameter {list(p.shape)} of {_SHARDERS[name]}: {REMEDY}")
            owners[id(p)].add(weakref.ref(holder))
    return [frozenset(owners[id(p)]) for p in parameters]


def _holders() -> Iterator[tuple[str, Any]]:
    """The live objects that hold parameters for several processes, by the name in the list of their bases."""
    return live({_REPLICA, *_SHARDERS})


def blamed(replicas: Replicas, fault: Callable[[Any], bool]) -> Any | None:
    """A live module with that fault, if there is one: none that only a cycle of references keeps."""

    def found() -> Any | None:
        return next((m for reference in replicas if (m := reference()) is not None and fault(m)), None)

    if found() is None:
        return None
    gc.collect()
    return found()


def averages(module: Any) -> bool:
    return processes_of(module) > 1


def has_static_graph(module: Any) -> bool:
    return averages(module) and getattr(module, "static_graph", False)


def static_graph_refused(module: Any, otherwise: str = "") -> NotImplementedError:
    return NotImplementedError(
        f"{name_of(module)} with static_graph=True learns from its first backward pass and is passed by in this one, "
        f"after which it might average no other: wrap the model with static_graph=False{otherwise}"
    )


def processes_of(module: Any) -> int:
    """How many processes a replica averages over."""
    return torch.distributed.get_world_size(group_of(module))


def group_of(module: Any) -> Any:
    group = getattr(module, "process_group", None)
    return torch.distributed.group.WORLD if group is None else group


def name_of(module: Any) -> str:
    return type(module).__name__
