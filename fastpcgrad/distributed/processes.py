"""Whose gradients a surgery merges: those of its own process. What would go wrong with more of them is refused.

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

_REMEDY = (
    "gradient surgery covers the DTensors of fully_shard, distribute_module and parallelize_module, by "
    "PCGrad.pc_backward, inside 'with surgery.task(t)' of GradientSurgery and by surgery.backward; no others"
)

_OF_ROWS = (
    "With GradientSurgery(..., process_group='local') and a forward of its own for each task inside 'with "
    "surgery.task(t)' the rows are averaged as they arise; seed the method's generator alike in all processes. In "
    "other calls process_group='local' merges what this process alone has seen"
)
_OF_NORMS = (
    "Give GradNorm.note(task, loss, norm) the norms of averaged gradients, and losses that are averaged over the "
    "processes, so that all come to the same weights; process_group='local' balances by what this process alone saw"
)

_no_replicas: Replicas = frozenset()
_replicas_of: Any = WeakTensorKeyDictionary()
"""By each parameter that was looked up for a call that keeps nothing: its replicas."""
_replicas_behind: Any = WeakTensorKeyDictionary()
"""By the parameter nearest to shared features: the replicas of all parameters that these depend on."""


def check_process_group(value: object) -> Choice:
    """Whose gradients are merged: ``auto``, which None means too, or ``local``.

    Raises:
        NotImplementedError: a process group or a device mesh.
        TypeError, ValueError: anything else; the message shows what was found.
    """
    if value is None:
        return "auto"
    groups = tuple(getattr(torch.distributed, name, ()) for name in ("ProcessGroup", "DeviceMesh"))
    if isinstance(value, groups):
        raise NotImplementedError(
            f"this version does not reduce gradients over processes; found process_group={value!r}: leave it 'auto', "
            "or pass 'local' where each process is to merge by itself"
        )
    if not isinstance(value, str):
        raise TypeError(f"process_group must be 'auto' or 'local'; found {type(value).__name__}")
    if value == "auto":
        return "auto"
    if value == "local":
        return "local"
    raise ValueError(f"process_group must be 'auto' or 'local'; found {value!r}")


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
    return check_process_group(value)


class Processes:
    """What an object that takes rows from ``.grad`` in many rounds knows about the processes it runs in.

    Args:
        process_group: see ``check_process_group``.
    """

    def __init__(self, process_group: object = "auto") -> None:
        self.process_group = check_process_group(process_group)
        self._checked: tuple[object, bool] = None, False
        self._replicas = _no_replicas

    def __reduce__(self) -> Any:
        # A copy has other parameters, perhaps in another process.
        return Processes, (self.process_group,)

    def check(self, parameters: Sequence[Tensor], *, moved: bool = False) -> None:
        """At the beginning of each round. Looks once at each list of parameters, known by its identity.

        Args:
            parameters: whose gradients become rows.
            moved: whether hooks take each gradient as soon as autograd has it.
        Raises:
            NotImplementedError: sharded parameters; ones whose gradients a module averages, unless the choice is
                ``local``; such a module with ``moved``. Nothing is changed.
        Warns:
            FastPCGradWarning: there are several processes, and nothing says that each is to merge by itself.
        """
        ready = _is_initialized()
        if self._checked[0] is parameters and self._checked[1] is ready and not _is_stale(self._replicas):
            return
        plain = [p for p in parameters if not is_dtensor(p)]
        _refuse_sharded(plain)
        self._replicas = _no_replicas.union(*_look_up(plain)) if ready and plain else _no_replicas
        if ready:
            _check_replicas(self._replicas, self.process_group, is_warned=len(plain) == len(parameters))
        if moved and (module := _blamed(self._replicas, _averages)):
            raise NotImplementedError(
                f"{_name(module)} averages gradients that have left for their rows by then, so that these would be of "
                "this process alone: leave row_dtype, row_device and accumulate_dtype None"
            )
        self._checked = parameters, ready

    def check_shared_forward(self, call: str) -> None:
        """Before several backward passes of losses that ``call`` was given, and that may come from one forward.

        Raises:
            NotImplementedError: a module averages the gradients of one backward pass a forward and leaves the others.
        """
        if not self._replicas:
            return
        if module := _blamed(self._replicas, lambda m: _averages(m) and getattr(m, "require_backward_grad_sync", True)):
            raise NotImplementedError(
                f"{call} runs several backward passes, and {_name(module)} would average the first over "
                f"{_processes(module)} processes and leave the others: give each task a forward of its own and run its "
                "backward inside 'with surgery.task(t)', or run forward and surgery inside no_sync() where each "
                "process is to merge by itself"
            )


def check_graph(tensors: Sequence[Tensor], process_group: object, remedy: str = _OF_ROWS) -> None:
    """Before ``torch.autograd.grad``, in a call that keeps nothing.

    Args:
        tensors: all leaves of the graph, and what else the gradients are taken of.
        process_group: see ``check_process_group``.
        remedy: what to do instead.
    Raises, Warns:
        see ``Processes.check``; also for ``static_graph``.
    """
    choice = check_process_group(process_group)
    _refuse_sharded(tensors)
    if not _is_initialized():
        return
    replicas = _remembered(tensors)
    _check_replicas(replicas, choice, remedy)
    if module := _blamed(replicas, lambda m: _averages(m) and getattr(m, "static_graph", False)):
        raise NotImplementedError(
            f"{_name(module)} with static_graph=True learns from its first backward pass and is passed by in this one, "
            "after which it might average no other: wrap the model with static_graph=False"
        )


def check_layer(layer: Sequence[Tensor], process_group: object) -> None:
    """Before norms of the task gradients at a layer are taken: parameters, or what is computed from some.

    Raises, Warns:
        see ``check_graph``.
    """
    choice = check_process_group(process_group)
    features = [z for z in layer if not z.is_leaf]
    if features and _is_initialized():
        _check_replicas(_found_behind(features), choice, _OF_NORMS)
    check_graph(layer, choice, _OF_NORMS)


def groups_behind(features: Sequence[Tensor], chosen: Choice | list[Any]) -> list[Any]:
    """The groups over which the gradients of all parameters are averaged that ``features`` depend on.

    Args:
        chosen: see ``check_groups``: groups are those, and with ``local`` there are none.
    Raises:
        NotImplementedError: sharded parameters, or several modules that average over different groups.
    Warns:
        FastPCGradWarning: see ``Processes.check``.
    """
    if isinstance(chosen, list) or not _is_initialized():
        return chosen if isinstance(chosen, list) else []
    replicas = _found_behind(features)
    if chosen == "local":
        return []
    _blamed(replicas, _averages)  # which collects modules that are gone
    averaging = [module for reference in replicas if (module := reference()) is not None and _averages(module)]
    groups = {id(group): group for group in map(_group, averaging)}
    if len(groups) > 1:
        raise NotImplementedError(
            f"parameters are averaged over {len(groups)} different process groups: pass the one of the batch as "
            "process_group"
        )
    if not groups:
        _check_replicas(replicas, chosen)
    return list(groups.values())


def _found_behind(features: Sequence[Tensor]) -> Replicas:
    """The replicas of all parameters that ``features`` depend on; NotImplementedError for sharded ones.

    In a training loop they are other tensors in each step. As long as the parameter nearest to each is the same, they
    are taken to depend on the same others: the graph is walked in the first step only.
    """
    nearest = [next((p for p in leaves([z], hidden=True) if isinstance(p, Parameter)), None) for z in features]
    if all(p is not None and not _is_stale(_replicas_behind.get(p)) for p in nearest):
        return _no_replicas.union(*map(_replicas_behind.__getitem__, nearest))
    behind = list(leaves(features, hidden=True))
    _refuse_sharded([*features, *behind])
    replicas = _remembered(behind)
    _replicas_behind.update((p, replicas) for p in nearest if p is not None)
    return replicas


def _is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _refuse_sharded(tensors: Iterable[Tensor]) -> None:
    """NotImplementedError for what says itself that this process has a part of it only."""
    if "torch.distributed.tensor" not in sys.modules and not _is_initialized():  # no shards without either
        return
    for tensor in tensors:
        shape = list(tensor.shape)
        if is_dtensor(tensor):
            placed: Any = tensor
            raise NotImplementedError(
                f"found a DTensor {shape} with placements {placed.placements} on {placed.device_mesh}: {_REMEDY}"
            )
        if hasattr(tensor, "_st_info"):  # what DistributedDataParallel puts in the place of a DTensor
            raise NotImplementedError(f"found the local part {shape} of a DTensor: {_REMEDY}")
        if getattr(tensor, "_fsdp_flattened", False):
            raise NotImplementedError(f"found a parameter {shape} of FullyShardedDataParallel: {_REMEDY}")


def _check_replicas(replicas: Replicas, choice: Choice, remedy: str = _OF_ROWS, *, is_warned: bool = True) -> None:
    """With ``auto``, that no module averages the gradients; a warning where there are several processes without one."""
    if choice == "local":
        return
    if module := _blamed(replicas, _averages):
        raise NotImplementedError(
            f"{_name(module)} averages the gradients of these parameters over {_processes(module)} processes, and this "
            f"version does not reduce task gradients. {remedy}"
        )
    processes = torch.distributed.get_world_size()
    if processes > 1 and is_warned:
        warn_once(
            f"each of the {processes} processes takes the task gradients of its own batch by itself, and no "
            "DistributedDataParallel holds these parameters: wrap the model before its first round, or pass "
            "process_group='local' if that is meant"
        )


def _remembered(tensors: Iterable[Tensor]) -> Replicas:
    """The replicas of all of them. Modules hold nothing but parameters, so that no other leaf is looked up."""
    parameters = [p for p in tensors if isinstance(p, Parameter)]
    unknown = [p for p in parameters if _is_stale(_replicas_of.get(p))]
    if unknown:
        _replicas_of.update(zip(unknown, _look_up(unknown), strict=True))
    return _no_replicas.union(*map(_replicas_of.__getitem__, parameters))


def _is_stale(replicas: Replicas | None) -> bool:
    """Whether parameters were never looked up, or one that held them is gone, and another may have taken its place."""
    return any(reference() is None for reference in replicas) if replicas else replicas is None


def _look_up(parameters: Sequence[Tensor]) -> list[Replicas]:
    """The replicas of each parameter; NotImplementedError for one that is sharded and does not say so itself.

    Such are the parameters that a forward pass gathers: plain ones, which are the leaves of the graph and at times the
    module's, while the optimizer has the shards.
    """
    owners: dict[int, set[weakref.ref[Any]]] = {id(p): set() for p in parameters}
    for name, holder in _holders():
        values = list(vars(holder).values())
        modules = [module for module in (holder, *values) if isinstance(module, torch.nn.Module)]
        held = [*values, *(p for module in modules for p in module.parameters())]
        for p in held:
            if id(p) not in owners:
                continue
            if name in _SHARDERS:
                raise NotImplementedError(f"found a parameter {list(p.shape)} of {_SHARDERS[name]}: {_REMEDY}")
            owners[id(p)].add(weakref.ref(holder))
    return [frozenset(owners[id(p)]) for p in parameters]


def _holders() -> Iterator[tuple[str, Any]]:
    """The live objects that hold parameters for several processes, by the name in the list of their bases."""
    objects = gc.get_objects()
    kinds = {id(kind): kind for kind in map(type, objects)}  # by id: a class need not be hashable
    names = {
        key: base.__name__
        for key, kind in kinds.items()
        for base in kind.__mro__
        if base.__name__ == _REPLICA or base.__name__ in _SHARDERS
    }
    return ((names[id(type(found))], found) for found in objects if id(type(found)) in names)


def _blamed(replicas: Replicas, fault: Callable[[Any], bool]) -> Any | None:
    """A live module with that fault, if there is one: none that only a cycle of references keeps."""

    def found() -> Any | None:
        return next((m for reference in replicas if (m := reference()) is not None and fault(m)), None)

    if found() is None:
        return None
    gc.collect()
    return found()


def _averages(module: Any) -> bool:
    return _processes(module) > 1


def _processes(module: Any) -> int:
    """How many processes a replica averages over."""
    return torch.distributed.get_world_size(_group(module))


def _group(module: Any) -> Any:
    group = getattr(module, "process_group", None)
    return torch.distributed.group.WORLD if group is None else group


def _name(module: Any) -> str:
    return type(module).__name__
