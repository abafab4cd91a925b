"""Whose gradients a surgery merges: those of its own process, or the means over a group."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import is_joined
from .._warnings import warn_once
from .local_tensors import is_dtensor
from .processes import (
    NO_REPLICAS,
    REMEDY,
    Replicas,
    averages,
    blamed,
    check_graph,
    check_process_group,
    check_replicas,
    group_of,
    has_static_graph,
    is_initialized,
    is_stale,
    look_up,
    name_of,
    processes_of,
    refuse_sharded,
    remembered,
    static_graph_refused,
)
from .quiet import Silence, is_armed

_known: weakref.WeakSet[Any] = weakref.WeakSet()
"""Modules that were there after a collection."""
NOBODY = Silence(())


class Processes:
    """What an object that takes rows from ``.grad`` in many rounds knows about the processes it runs in.

    Args:
        process_group: see ``check_process_group``.
        parallel: ``data``: each process has its part of every task's batch. ``task``: each has some of the tasks.
    Raises:
        TypeError, ValueError: others, or ``task`` with each process by itself.
    """

    def __init__(self, process_group: object = "auto", parallel: str = "data") -> None:
        self.process_group = check_process_group(process_group)
        if parallel not in ("data", "task"):
            raise ValueError(f"parallel must be 'data' or 'task'; found {parallel!r}")
        self.by_task = parallel == "task"
        if self.by_task and self.process_group == "local":
            raise ValueError("parallel='task' shares tasks out among processes; found process_group='local'")
        self.group: Any = None
        """Over which the rows of all parameters are means; None: they are those of this process."""
        self._checked: tuple[object, bool] = None, False
        self._replicas = NO_REPLICAS

    def __reduce__(self) -> Any:
        # A copy has other parameters, perhaps in another process.
        return Processes, (self.process_group, self._parallel)

    def __deepcopy__(self, memo: object) -> Processes:
        return Processes(self.process_group, self._parallel)  # of the same group, which cannot be copied

    def __repr__(self) -> str:
        return f"process_group={self.process_group!r}, parallel={self._parallel!r}"

    @property
    def _parallel(self) -> str:
        return "task" if self.by_task else "data"

    def check(self, parameters: Sequence[Tensor], *, moved: bool = False) -> None:
        """At the beginning of each round. Looks once at each list of parameters, known by its identity.

        Args:
            parameters: whose gradients become rows.
            moved: whether hooks take each gradient as soon as autograd has it, where rows are those of this process.
        Raises:
            NotImplementedError: sharded parameters; modules that average some parameters and not the others, over
                several groups, in another dtype, or with inputs that end at different steps; with ``local`` and
                ``moved`` any that averages; with ``task`` DTensors and static graphs. Nothing is changed.
            RuntimeError: ``task`` without a process group.
        Warns:
            FastPCGradWarning: there are several processes, and nothing says that each is to merge by itself; a module
                has hooks for its communication, which is not used.
        """
        ready = is_initialized()
        if self.by_task and not ready:
            raise RuntimeError("parallel='task' needs several processes: call torch.distributed.init_process_group()")
        if self._checked[0] is not parameters or self._checked[1] is not ready or is_stale(self._replicas):
            plain = [p for p in parameters if not is_dtensor(p)]
            refuse_sharded(plain)
            each = look_up(plain) if ready and plain else []
            self._replicas = NO_REPLICAS.union(*each)
            if self._replicas:
                gc.collect()  # modules that only a cycle of references keeps
            if ready:
                dtensors = len(parameters) - len(plain)
                self.group = _group(plain, each, self._replicas, self.process_group, dtensors, self.by_task)
            self._checked = parameters, ready
        if not self._replicas:
            return
        if self.group is None and moved and (module := blamed(self._replicas, averages)):
            self._checked = None, False
            raise NotImplementedError(
                f"{name_of(module)} averages gradients that have left for their rows by then, so that these would be "
                "of this process alone: leave row_dtype, row_device and accumulate_dtype None"
            )
        if self.group is not None and (module := blamed(self._replicas, is_joined)):
            raise _joined(module)
        if self.by_task and (module := blamed(self._replicas, has_static_graph)):
            raise static_graph_refused(module)

    def silence(self) -> Silence:
        """Of the modules that average, for a stay in which no other process need run a backward pass."""
        if not self.by_task:
            return NOBODY
        modules = [reference() for reference in self._replicas]
        return Silence([module for module in modules if module is not None and averages(module)])

    def is_averaging(self) -> bool:
        """Whether a module averages in backward passes, as far as its last forward pass says."""
        return any((module := reference()) is not None and is_armed(module) for reference in self._replicas)

    def check_passes(self, losses: int) -> None:
        """Before a call runs backward passes itself.

        Args:
            losses: how many of one forward, maybe.
        Raises:
            NotImplementedError: a module would average none after these passes, which it is not to see, or averages
                the gradients of one backward pass a forward and leaves the others.
        """
        if not self._replicas:
            return
        if self.group is not None:
            if module := blamed(self._replicas, has_static_graph):
                raise static_graph_refused(module, ", or run each task's backward inside 'with surgery.task(t)'")
        elif losses > 1 and (module := blamed(self._replicas, _would_average)):
            raise NotImplementedError(
                f"a call with several losses runs several backward passes, and {name_of(module)} would average the "
                f"first over {processes_of(module)} processes and leave the others: give each task a forward of its "
                "own and run its backward inside 'with surgery.task(t)', or run forward and surgery inside no_sync() "
                "where each process is to merge by itself"
            )


def group_of_graph(leaves: Sequence[Tensor], inputs: Sequence[Tensor], process_group: object) -> Any:
    """Over which the task gradients of a call that keeps nothing are means; None: they are those of this process.

    Args:
        leaves: of the graph.
        inputs: that the gradients are taken of.
        process_group: see ``check_process_group``.
    Raises, Warns:
        see ``Processes.check``; also for ``static_graph``.
    """
    choice = check_process_group(process_group)
    check_graph([*leaves, *inputs], "local")
    if not is_initialized():
        return None
    replicas = remembered([*leaves, *inputs])
    group = _group(inputs, [remembered([value]) for value in inputs], replicas, choice)
    if group is not None and (module := blamed(replicas, is_joined)):
        raise _joined(module)
    return group


def _group(
    parameters: Sequence[Tensor],
    replicas: Sequence[Replicas],
    everything: Replicas,
    choice: Any,
    dtensors: int = 0,
    by_task: bool = False,
) -> Any:
    """The group over which the gradients of all parameters are to be averaged; None where there is none.

    Args:
        parameters: no DTensors.
        replicas: of each.
        everything: replicas of all that the losses depend on.
        choice: see ``check_process_group``.
        dtensors: how many there are beside them.
        by_task: whether tasks are shared out among processes: all there are, unless something says which.
    """
    if choice == "local":
        return None
    averaging = _averaging(everything)
    groups = {id(group): group for group in map(group_of, averaging.values())}
    if choice != "auto":
        groups[id(choice)] = choice
    elif by_task and not groups:
        choice = torch.distributed.group.WORLD
        groups[id(choice)] = choice
    if len(groups) > 1:
        raise NotImplementedError(f"gradients are averaged over {len(groups)} different process groups; use one")
    if not groups:
        check_replicas(NO_REPLICAS, choice, is_warned=not dtensors)
        return None
    if torch.distributed.get_world_size(choice if choice != "auto" else next(iter(groups.values()))) == 1:
        return None
    if by_task and dtensors:
        raise NotImplementedError(
            f"parallel='task' with {dtensors} DTensors, of which no process has all: leave parallel='data'"
        )
    if dtensors:
        raise NotImplementedError(
            f"found {dtensors} DTensors beside {len(parameters)} parameters whose gradients are averaged over "
            f"processes: {REMEDY}"
        )
    if choice == "auto":
        _check_held(parameters, replicas, averaging)
    for module in averaging.values():
        if getattr(module, "mixed_precision", None) is not None:
            raise NotImplementedError(
                f"{name_of(module)} with mixed_precision has gradients of another dtype than its parameters: use "
                "autocast"
            )
        if getattr(module, "_comm_hooks", None):
            warn_once(f"the communication hook of {name_of(module)} is not used for task gradients")
    return next(iter(groups.values()))


def _averaging(everything: Replicas) -> dict[weakref.ref[Any], Any]:
    """The modules that average gradients: none that only a cycle of references keeps, where one is seen first."""

    def found() -> dict[weakref.ref[Any], Any]:
        return {r: module for r in everything if (module := r()) is not None and averages(module)}

    if any(module not in _known for module in found().values()):
        gc.collect()
        _known.update(found().values())
    return found()


def _check_held(
    parameters: Sequence[Tensor], replicas: Sequence[Replicas], averaging: Mapping[weakref.ref[Any], Any]
) -> None:
    """NotImplementedError for parameters whose gradients nobody averages beside those of a module."""
    outside = [p for p, own in zip(parameters, replicas, strict=True) if own.isdisjoint(averaging)]
    if outside:
        raise NotImplementedError(
            f"{name_of(next(iter(averaging.values())))} does not average the gradients of {len(outside)} of "
            f"{len(parameters)} parameters or inputs, the first of shape {list(outside[0].shape)}: wrap them too; or "
            "pass its process_group, over which all are averaged then, or process_group='local' where each process "
            "is to merge by itself"
        )


def _would_average(module: Any) -> bool:
    return averages(module) and getattr(module, "require_backward_grad_sync", True)


def _joined(module: Any) -> NotImplementedError:
    return NotImplementedError(
        f"{name_of(module)} is or was in join(), where processes end at different steps, and surgery needs all of "
        "them in each round: give all the same number of batches"
    )
