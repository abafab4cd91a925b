"""What a balancer is: T task losses in, T weighted losses out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import is_fake
from .._tasks import check_names, check_tasks, in_order, index_of
from ..distributed.links import Link
from ..distributed.processes import check_groups, groups_behind
from . import refusals

Losses = Sequence[Tensor] | Mapping[Any, Tensor] | Tensor
"""One for each task."""

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]
"""Makes the optimizer of a balancer's own weights, as ``functools.partial(torch.optim.SGD, lr=0.1)`` does."""


class Balancer(nn.Module, ABC):
    """Weighs task losses; calling it gives the weighted losses, to be summed or handed to gradient surgery.

    A subclass gives ``weigh``. State lies in parameters and buffers, so ``state_dict``, ``to(device)`` and
    ``double()`` work as for any module. Names of tasks are in ``state_dict``, too, and a state of other names or of
    another order is refused. No call waits for a GPU.

    A step in which a loss (or norm) is NaN or infinite is skipped: weights, state and optimizer stay as they were, and
    training goes on as if the step had not been. Its weighted losses show it: a finite weight times NaN.

    In data-parallel training the weights are the same in all processes where all are given the same numbers: losses
    that are averaged over the processes, as ``torch.distributed.all_reduce`` does, weigh the loss of each.

    Finite losses that a balancer's formula has no answer for (GradNorm, FAMO, DWA) are a ValueError. Where looking
    would wait, on a GPU, that step is skipped and a later call raises, once the device has answered; a captured CUDA
    graph skips and raises nothing.

    With a process group all processes have the weights of the whole batch: losses are averaged over it before they are
    looked at (T numbers a call), and each weighs its own.

    Args:
        num_tasks: T; or ``tasks``.
        process_group: over which processes the losses of a step are averaged. ``auto``: those over which
            DistributedDataParallel averages the parameters that the losses depend on; a warning, once, where there are
            several processes without it. A process group, or a device mesh: those. ``local``: none.
        tasks: their names, in the order of their indices, or T. What takes a list of losses takes a dict by names.
    Attributes:
        num_tasks: T.
        tasks: their names; empty where they have none.
        weights: ``[T]``, detached: what the last call multiplied the losses by. Where they do not depend on the
            losses of the call itself (GradNorm, UncertaintyWeighting, DWA) it is what the next call will use, so that
            ``balancer.weights[t] * loss`` serves a loop that has one task's graph at a time.
    Raises:
        TypeError: both ``num_tasks`` and ``tasks``, or neither; names that are no strings; a ``process_group`` of
            another kind.
        ValueError: ``num_tasks`` is no integer >= 1, a name twice, or another ``process_group``.
    """

    weights: Tensor

    def __init__(
        self,
        num_tasks: int | None = None,
        process_group: object = "auto",
        *,
        tasks: Sequence[str] | int | None = None,
    ) -> None:
        super().__init__()
        self.num_tasks, self.tasks = check_tasks(num_tasks, tasks)
        self._refusals = refusals.Refusals()
        check_groups(process_group)  # the object itself is kept: what it stands for may be gone when this is loaded
        self.process_group = process_group
        self._link: Link | None = None
        self.register_state_dict_post_hook(_with_names)
        self.register_load_state_dict_pre_hook(_without_names)

    @abstractmethod
    def weigh(self, losses: Tensor) -> Tensor:
        """The weights of this step: ``[T]``.

        Args:
            losses: ``[T]``, detached, of the dtype and on the device of ``weights``; their means over the processes.
        """

    def forward(self, losses: Losses) -> Any:
        """The weighted losses w_i L_i.

        Args:
            losses: T scalar losses, of any shape with one element, or one tensor ``[T]`` or ``[T, 1]``; real floating
                point, on the device of the balancer. A dict has them by their tasks' names, or by index.
        Returns:
            a dict for a dict, a list for a sequence, a tensor for a tensor, in the shapes of what was given. Each loss
            of a list depends on the graph of its own task alone; elements of a tensor share theirs, so that a backward
            pass of one runs through all.
        Raises:
            TypeError: losses that are no real floating-point tensors.
            ValueError: not T, not scalar, or on another device; a dict that lacks a task, or has an unknown one; values
                that the balancer cannot take.
        """
        listed = self._listed(losses)
        weighted = self._weighted(listed)
        if not isinstance(losses, Mapping):
            return weighted
        return {key: weighted[index_of(key, self.num_tasks, self.tasks)] for key in losses}

    def _listed(self, losses: Losses) -> list[Tensor] | Tensor:
        """Losses in the order of the tasks; ValueError where a dict lacks one."""
        if isinstance(losses, Tensor):
            return losses
        listed = list(in_order(losses, self.num_tasks, self.tasks))
        if isinstance(losses, Mapping) and (missing := [t for t, loss in enumerate(listed) if loss is None]):
            named = [self.tasks[t] for t in missing] if self.tasks else missing
            raise ValueError(
                f"losses must have all {self.num_tasks} tasks, of which a balancer compares each; {named} missing"
            )
        return listed

    def _weighted(self, losses: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
        """See ``forward``: a list for a list, a tensor for a tensor."""
        self._refusals.raise_due()
        own = self._vector("losses", losses)
        self._look_for_others(losses)
        means = self._mean(own)
        weights = self.weigh(means)
        # What a backward pass teaches the weights, it teaches all by the means.
        extra = (
            (weights - weights.detach()) * (means - own) if self._link is not None and weights.requires_grad else None
        )
        if isinstance(losses, Tensor):
            weighted = weights.view_as(losses) * losses
            return weighted if extra is None else weighted + extra.view_as(losses)
        each = [weight * loss for weight, loss in zip(weights.unbind(), losses, strict=True)]
        return each if extra is None else list(map(torch.add, each, extra.unbind()))

    def _look_for_others(self, losses: Sequence[Tensor] | Tensor) -> None:
        """Those with other parts of the batch: they are asked until the next losses come that have a graph."""
        given = [losses] if isinstance(losses, Tensor) else losses
        chosen = check_groups(self.process_group)
        if isinstance(chosen, list) or any(loss.requires_grad for loss in given):
            groups = groups_behind(given, chosen)
            self._link = Link(groups) if groups else None

    def _mean(self, values: Tensor) -> Tensor:
        """Over the parts of the batch."""
        return values if self._link is None else self._link.mean(values)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_link": None}  # a copy looks for itself

    def _vector(self, name: str, values: Sequence[Tensor] | Tensor) -> Tensor:
        """T scalars as one detached ``[T]``, of the dtype and on the device of the weights."""
        count = self.num_tasks
        if isinstance(values, Tensor):
            if values.shape not in ((count,), (count, 1)):
                raise ValueError(f"{name} must be {count} scalars or one tensor [{count}]; found {list(values.shape)}")
            return self._like_weights(name, values).flatten()
        if len(values) != count:
            raise ValueError(f"{name} must be {count} scalars, one a task; found {len(values)}")
        return torch.stack([self._scalar(f"{name}[{t}]", value) for t, value in enumerate(values)])

    def _scalar(self, name: str, value: Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; found {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"{name} must be a scalar; found shape {list(value.shape)}")
        return self._like_weights(name, value).reshape(())

    def _like_weights(self, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            raise TypeError(f"{name} must be real floating point; found {value.dtype}")
        weights = self.weights
        if value.device != weights.device:
            raise ValueError(
                f"{name} must be on {weights.device}, as the balancer (which .to(device) moves); found {value.device}"
            )
        return value.detach().to(weights.dtype)

    def extra_repr(self) -> str:
        return f"tasks={list(self.tasks)}" if self.tasks else f"num_tasks={self.num_tasks}"


_NAMES = "tasks"


def _with_names(balancer: Balancer, state: dict[str, Any], prefix: str, _: object) -> None:
    if balancer.tasks:
        state[prefix + _NAMES] = list(balancer.tasks)


def _without_names(balancer: Balancer, state: dict[str, Any], prefix: str, *_: object) -> None:
    check_names(balancer.tasks, state.pop(prefix + _NAMES, None))


class LearnedBalancer(Balancer):
    """A balancer that takes steps of its own optimizer on one tensor, with gradients that it computes itself.

    A skipped step leaves the optimizer as it was. On a GPU, where it is taken back, that holds for the tensors of its
    state on that GPU; torch's optimizers are made to keep their counts of steps there (``capturable``). A count that
    another optimizer keeps on the host goes on.
    """

    optimizer: torch.optim.Optimizer

    def _learn(self, learned: Tensor, optimizer: OptimizerFactory) -> nn.Parameter:
        """The parameter, which asks for no gradient: another optimizer that finds it leaves it alone."""
        parameter = nn.Parameter(learned, requires_grad=False)
        if not callable(optimizer):
            raise TypeError(
                "optimizer must make an optimizer of a list of tensors, as functools.partial(torch.optim.Adam, lr=0.1) "
                f"does; found {optimizer!r}"
            )
        self.optimizer = optimizer([parameter])
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must make a torch.optim.Optimizer; it made {self.optimizer!r}")
        self._load(parameter.device, self.optimizer.state_dict())
        return parameter

    @torch.no_grad()
    def _step(self, parameter: Tensor, gradient: Tensor, finish: Callable[[Tensor], Tensor] | None = None) -> None:
        """One step of the optimizer, then ``finish`` on the parameter.

        None where the gradient, or what the parameter would be, is not finite.
        """
        sound = all_finite(gradient)
        if refusals.known(sound) is False:
            return
        before = {key: value.clone() for key, value in self._held(parameter).items()}
        parameter.grad = torch.where(sound, gradient, 0.0)
        self.optimizer.step()
        parameter.grad = None
        if finish is not None:
            parameter.copy_(finish(parameter))
        sound = sound & all_finite(parameter)
        for key, value in self._held(parameter).items():
            if key in before:
                value.copy_(torch.where(sound, value, before[key]))
            elif key == "step":
                value.mul_(sound)
            # What else the optimizer has made in this first step is what a gradient of 0 leaves.

    def _held(self, parameter: Tensor) -> dict[str | None, Tensor]:
        """What a step changes and can be given back: the parameter (None) and its tensors in the optimizer's state."""
        held: dict[str | None, Tensor] = {None: parameter}
        for key, value in self.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.device == parameter.device:
                held[key] = value
        return held

    def get_extra_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._load(self.weights.device, state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedBalancer:
        super()._apply(fn, recurse)
        self._load(self.weights.device, self.optimizer.state_dict())
        return self

    def _load(self, device: torch.device, state: dict[str, Any]) -> None:
        """Cast and move the optimizer's state to where the parameter is; counts of steps onto a GPU, too."""
        on_gpu = device.type == "cuda"
        groups = [group | {"capturable": on_gpu} if "capturable" in group else group for group in state["param_groups"]]
        self.optimizer.load_state_dict(state | {"param_groups": groups})
        if not on_gpu:
            # load_state_dict leaves these where they were.
            for held in self.optimizer.state.values():
                if isinstance(held.get("step"), Tensor):
                    held["step"] = held["step"].cpu()


def all_finite(*values: Tensor) -> Tensor:
    """Whether everything in them is finite: a bool on their device."""
    return torch.stack([value.isfinite().all() for value in values]).all()


def task_values(name: str, values: Iterable[float] | Tensor, num_tasks: int) -> Tensor:
    """One finite number a task, as ``[T]``.

    Raises:
        ValueError: not T, or not finite.
    """
    found = torch.as_tensor(values if isinstance(values, Tensor) else list(values)).detach().clone()
    found = found if found.is_floating_point() else found.to(torch.get_default_dtype())
    if found.shape != (num_tasks,) or not (is_fake(found) or found.isfinite().all()):
        raise ValueError(f"{name} must be {num_tasks} finite numbers, one a task; found {found.tolist()}")
    return found
