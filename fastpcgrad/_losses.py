"""What front ends take for task losses and for lists of tensors, and how they refuse the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from ._checks import check_tensor
from ._graph import leaves, unreached

Forward = Callable[[], Tensor | None]
"""Runs a task's forward and gives its loss; None: the task is absent."""


def check_losses(losses: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The task losses as a list: ``present_losses`` where none may be absent."""
    given = list(losses) if not isinstance(losses, Tensor) and isinstance(losses, Iterable) else losses
    present = present_losses(given)
    absent = [t for t in range(len(given)) if t not in present]
    if absent:
        raise TypeError(f"losses[{absent[0]}] must be a torch.Tensor; found NoneType")
    return list(present.values())


def present_losses(losses: Sequence[Tensor | None] | Tensor, *, may_be_none: bool = False) -> dict[int, Tensor]:
    """The task losses by the index of their task, without those that are None: tasks that are absent.

    Args:
        losses: T scalars, of any shape with one element, or one tensor ``[T]`` or ``[T, 1]``.
        may_be_none: all may be absent, as other processes have some.
    Raises:
        TypeError: no sequence of tensors, or complex or integer losses.
        ValueError: empty, all absent, not scalar, without grad, or on several devices; the message shows what was
            found.
    """
    if not isinstance(losses, list | tuple):  # to ask for those first is what takes least
        if isinstance(losses, Tensor):
            if losses.dim() not in (1, 2) or losses.shape[1:] not in ((), (1,)):
                raise ValueError(f"losses must be scalars, or one tensor [T]; found a tensor {list(losses.shape)}")
            losses = losses.flatten().unbind()
        if not isinstance(losses, Iterable) or isinstance(losses, Set):  # which would have them in any order
            raise TypeError(f"losses must be a sequence of scalar tensors; found {type(losses).__name__}")
    found = list(losses)
    if not found:
        raise ValueError("losses must hold at least one task loss; found none")
    present = {t: check_loss(f"losses[{t}]", loss) for t, loss in enumerate(found) if loss is not None}
    if not present and not may_be_none:
        raise ValueError(f"losses must hold a task that is not absent; found {len(found)} times None")
    devices = {loss.device for loss in present.values()}
    if len(devices) > 1:
        raise ValueError(f"losses must be on one device; found {', '.join(sorted(map(str, devices)))}")
    return present


def check_losses_of_samples(losses: Any, batch_dim: int) -> Tensor:
    """One tensor with a loss for each sample of a batch, ``[B]``; of those that ``present_losses`` takes.

    Raises:
        TypeError: no tensor, or complex or integer losses.
        ValueError: another ``batch_dim`` than 0, another shape than ``[B]`` or ``[B, 1]``, empty, without grad.
    """
    if batch_dim != 0 or isinstance(batch_dim, bool):
        raise ValueError(f"batch_dim must be 0 or None; found {batch_dim!r}")
    if not isinstance(losses, Tensor):
        raise TypeError(f"batch_dim=0 needs one tensor [B] with the losses; found {type(losses).__name__}")
    if losses.dim() not in (1, 2) or losses.shape[1:] not in ((), (1,)) or not losses.numel():
        raise ValueError(f"batch_dim=0 needs losses [B] of one sample or more; found a tensor {list(losses.shape)}")
    if not losses.is_floating_point():
        raise TypeError(f"losses must be real floating point; found {losses.dtype}")
    if not losses.requires_grad:
        raise ValueError("losses have no grad: they depend on nothing that requires grad")
    return losses.flatten()


def check_loss(name: str, loss: Any) -> Tensor:
    """``loss`` itself.

    Raises:
        TypeError: no tensor, or complex or integer.
        ValueError: not scalar, or without grad; the message shows what was found.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; found {type(loss).__name__}")
    if not loss.is_floating_point():
        raise TypeError(f"{name} must be real floating point; found {loss.dtype}")
    if loss.numel() != 1:
        raise ValueError(f"{name} must be a scalar; found shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(f"{name} has no grad: it depends on nothing that requires grad (a task is absent by None)")
    return loss


def check_round(
    losses: Sequence[Forward | None] | Sequence[Tensor | None] | Tensor, tasks: int, *, may_be_none: bool = False
) -> tuple[dict[int, Tensor], dict[int, Forward]]:
    """Losses, or functions that give them, by the index of their task; without those that are absent.

    Args:
        may_be_none: see ``present_losses``.
    """
    if isinstance(losses, Tensor):
        present = present_losses(losses)
        _check_count(losses.numel(), tasks)
        return present, {}
    if not isinstance(losses, Iterable) or isinstance(losses, Set):
        raise TypeError(f"losses must be a sequence of functions or scalar tensors; found {type(losses).__name__}")
    given: list[Any] = list(losses)
    _check_count(len(given), tasks)
    functions = {t: loss for t, loss in enumerate(given) if callable(loss)}
    others = {t: loss for t, loss in enumerate(given) if loss is not None and t not in functions}
    if functions and not others:
        return {}, functions
    for t, loss in others.items() if functions else ():
        if isinstance(loss, Tensor):
            raise TypeError(
                f"losses must be all functions or all tensors; found tasks {list(functions)} with functions"
            )
        check_loss(f"losses[{t}]", loss)
    return present_losses(given, may_be_none=may_be_none), {}


def _check_count(found: int, tasks: int) -> None:
    if found != tasks:
        raise ValueError(f"losses must hold one for each of the {tasks} tasks, None for one absent; found {found}")


def check_tensors(name: str, values: Iterable[Any]) -> list[Tensor]:
    """``values`` as a list.

    Raises:
        TypeError: a single tensor, no iterable, or something in it is no tensor.
    """
    if isinstance(values, Tensor) or not isinstance(values, Iterable):
        found = f"a single tensor {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be an iterable of tensors; found {found}")
    tensors = list(values)
    for i, value in enumerate(tensors):
        check_tensor(f"{name}[{i}]", value)
    return tensors


def check_reached(losses: Mapping[int, Tensor], inputs: Sequence[Tensor]) -> None:
    """ValueError for a loss without a gradient with respect to any input, before any is run."""
    given = list(losses.values())
    lost = unreached(given, inputs)
    if not lost and len(given) > 1:
        lost = _stand_ins(given, inputs)
    if lost:
        index = list(losses)[lost[0]]
        raise ValueError(
            f"losses[{index}] depends on none of the {len(inputs)} inputs: give None for it, or name inputs that it "
            "depends on. If a hook on it runs its real backward pass, as in losses with a gradient cache, use "
            "PCGrad.pc_backward or 'with surgery.task(t)': these take what it leaves in .grad"
        )


def _stand_ins(losses: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[int]:
    """The losses that depend on nothing but a scalar of their own with a hook, which runs the real backward pass."""
    scalars = {id(x) for x in inputs if x.numel() == 1 and x._backward_hooks and not isinstance(x, Parameter)}
    if not scalars:
        return []
    suspects = unreached(losses, [x for x in inputs if id(x) not in scalars])
    behind = [{id(leaf) for leaf in leaves([loss])} for loss in losses]
    return [t for t in suspects if all(behind[t].isdisjoint(other) for u, other in enumerate(behind) if u != t)]
