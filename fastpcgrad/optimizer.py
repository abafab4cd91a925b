"""PCGrad(optimizer): the drop-in for the widely used PyTorch PCGrad."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import methods
from .functional import check_losses, check_tensors
from .report import ConflictReport
from .surgery import GradientSurgery
from .variants import Generator


class PCGrad(torch.optim.Optimizer):
    """Wraps an optimizer; ``pc_backward`` puts the merged gradient of all task losses into ``.grad``.

    It is a ``torch.optim.Optimizer`` whose parameter groups, state, defaults and hooks are those of the wrapped
    one, so learning-rate schedulers, ``torch.amp.GradScaler`` and checkpoints work on either, and a state dict of
    one loads into the other.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        reduction: ``mean`` or ``sum``; None: the variant's own, which is ``mean`` for the default variant.
        variant: whose PCGrad: pytorch-pcgrad, paper, tensorflow, torchjd, libmtl or tensorlogic.
        method: any ``methods.Method`` instead of a variant.
        shared: the parameters that undergo surgery; the gradients of the others are summed. None: as the variant
            has it.
        generator: for the order of the projections; None: the global generator of the variant's original.
        row_dtype: dtype of the packed gradients; None: that of the parameters.
        process_group: None; distributed training is not covered by this version.
    Attributes:
        optimizer: the wrapped optimizer.
        report: ``ConflictReport`` of the last surgery, None before the first.
    Memory: T·N·itemsize bytes beyond the model, kept between steps; the merged gradient lies in them.
    Raises:
        TypeError: ``optimizer`` is none, or wrong types of the others.
        ValueError: unknown variant or reduction, or both ``method`` and a choice that belongs to a variant.
    Source: Yu et al. 2020, arXiv:2001.06782. Oracle: ``reference.merge``.
    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> opt.zero_grad()
        >>> left, right = model(torch.ones(1, 4)).square().unbind(dim=1)
        >>> opt.pc_backward([left, right])
        >>> opt.step()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reduction: Literal["sum", "mean"] | None = None,
        *,
        variant: str | None = None,
        method: methods.Method | None = None,
        shared: Iterable[Tensor] | None = None,
        generator: Generator | None = None,
        row_dtype: torch.dtype | None = None,
        process_group: object | None = None,
    ) -> None:
        # Optimizer.__init__ is not called: it would give this object groups and state of its own.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer; found {type(optimizer).__name__}")
        if method is None:
            method = methods.PCGrad(variant or "pytorch-pcgrad", reduction, generator)
        elif any(choice is not None for choice in (variant, reduction, generator)):
            raise ValueError(
                "method brings its own reduction and generator; "
                f"found besides it variant={variant!r}, reduction={reduction!r}, generator={generator!r}"
            )
        self.optimizer = optimizer
        self._opt_called = False
        self.report: ConflictReport | None = None
        self._method = method
        self._shared = None if shared is None else check_tensors("shared", shared)
        self._row_dtype = row_dtype
        self._process_group = process_group
        self._surgery = self._surgery_for(1)
        # Schedulers look here whether a step was made; the wrapped optimizer may be the one that is asked to make it.
        note = optimizer.register_step_post_hook(_note_step(weakref.ref(self)))
        weakref.finalize(self, note.remove)

    def _surgery_for(self, num_tasks: int) -> GradientSurgery:
        return GradientSurgery(
            self.optimizer,
            num_tasks,
            self._method,
            shared=self._shared,
            row_dtype=self._row_dtype,
            process_group=self._process_group,
        )

    def pc_backward(self, objectives: Sequence[Tensor] | Tensor, retain_graph: bool = False) -> None:
        """Run each task loss backward and replace ``.grad`` by the merged gradient.

        Args:
            objectives: T scalar losses, or one tensor ``[T]``; they may share a graph. Elements of a tensor share at
                least that: a backward pass of one gives what only others depend on zeros, which count as a gradient.
            retain_graph: keep the graphs for another backward pass; else the last pass frees them.
        Raises:
            TypeError: objectives that are no real floating-point tensors.
            ValueError: none given, not scalar, without grad, on several devices. ``.grad`` is not changed.
            Whatever a backward pass raises; then ``.grad`` is None where it held the last merged gradient, whose
            memory is that of the rows, and as before elsewhere.
        """
        losses = check_losses(objectives)
        if len(losses) > self._surgery.num_tasks:
            self._surgery = self._surgery_for(len(losses))
        surgery = self._surgery
        surgery.discard()
        surgery._run(losses, retain_graph)
        self.report = surgery.merge()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters of the wrapped optimizer."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; its parameters take part from the next surgery on."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapped optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        # Hooks and whatever else Optimizer keeps on the instance are the wrapped optimizer's. The flag that lets
        # GradScaler hand its scale to a fused step is not: it would put the scale on this object, not on that one.
        if name.startswith("__") or name in ("optimizer", "_step_supports_amp_scaling"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        # The rows and hooks are made anew: they belong to this process' parameters.
        return {
            "optimizer": self.optimizer,
            "method": self._method,
            "shared": self._shared,
            "row_dtype": self._row_dtype,
            "process_group": self._process_group,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        PCGrad.__init__(self, **state)

    def __repr__(self) -> str:
        return f"PCGrad({self._method!r}, {self.optimizer!r})"


def _note_step(wrapper: weakref.ref[PCGrad]) -> Callable[..., None]:
    def note(*_: Any) -> None:
        if (alive := wrapper()) is not None:
            alive._opt_called = True

    return note
