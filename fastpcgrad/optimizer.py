"""PCGrad(optimizer): the drop-in for the widely used PyTorch PCGrad."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import methods
from ._gradients import added
from ._loss_scales import refuse_unscaled
from ._losses import present_losses
from ._modes import not_compiled
from ._tasks import in_order
from ._warnings import warn, warn_of_fewer_losses, warn_of_one_loss
from .merging.report import ConflictReport
from .rows.choice import Choice
from .rows.departures import Overlap
from .rows.parameters import Scope
from .surgery import GradientSurgery
from .variants import Generator, Order

_NO_SURGERY = (
    "step() with gradients that no surgery has made: call pc_backward([loss_0, loss_1, ...]) of this optimizer instead "
    "of backward(); as it is, it does what the wrapped optimizer does"
)
_REPLACED = (
    "pc_backward() replaced the gradients of the last call, which no step has used; choose on_repeat='add' to "
    "accumulate, or clear them with zero_grad()"
)


_NEEDED = ("param_groups", "step", "zero_grad", "state_dict", "load_state_dict")
_STATE_KEY = "fastpcgrad"


class PCGrad(torch.optim.Optimizer):
    """Wraps an optimizer; ``pc_backward`` puts the merged gradient of all task losses into ``.grad``.

    It is a ``torch.optim.Optimizer`` whose parameter groups, state, defaults and hooks are those of the wrapped
    one, so learning-rate schedulers, ``torch.amp.GradScaler`` and checkpoints work on either, and a state dict of
    one loads into the other.

    Args:
        optimizer: any ``torch.optim.Optimizer``, also one that a trainer has prepared, or what acts as one.
        reduction: ``mean`` or ``sum``; None: the variant's own, which is ``mean`` for the default variant.
        variant: whose PCGrad, see ``methods.PCGrad``; None: pytorch-pcgrad.
        method: any ``methods.Method`` instead of a variant.
        shared: the parameters that undergo surgery; the gradients of the others are summed. ``auto``: those that two
            tasks or more reach, see ``GradientSurgery``. None: as the variant has it.
        gram_over: those of them that the Gram matrix is made of, or ``auto``; the weights reach all.
        generator, order: of the projections, see ``methods.PCGrad``; None: the variant's own.
        row_dtype: dtype of the packed gradients; None: that of the parameters.
        process_group, parallel, rows, overlap: see ``GradientSurgery``.
        tasks: the names of the tasks, in the order of the losses: ``pc_backward`` takes a dict of losses, too, and the
            report has the names. None: as many as there are losses, without names.
        on_repeat: what ``pc_backward`` does where the last one's gradients were not cleared: ``replace`` them, as the
            original does, with one warning where no step has used them; ``add`` to whatever ``.grad`` holds, as
            backward passes do, so that several calls accumulate; or ``raise``.
    Attributes:
        optimizer: the wrapped optimizer.
        report: ``ConflictReport`` of the last surgery, None before the first.
    Memory: T·N·itemsize bytes beyond the model, kept between steps; the merged gradient lies in them.
    Raises:
        TypeError: ``optimizer`` is none, or wrong types of the others.
        ValueError: unknown variant, reduction or ``on_repeat``, or both ``method`` and a choice that belongs to a
            variant.
    Warns:
        FastPCGradWarning: a single loss, or fewer losses than tasks for which the method keeps something (once a
            process); a step with gradients before the first ``pc_backward``, and gradients that were replaced before a
            step used them (once an object).
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
        shared: Scope = None,
        gram_over: Scope = None,
        generator: Generator | None = None,
        order: Order | None = None,
        row_dtype: torch.dtype | None = None,
        process_group: object = "auto",
        parallel: Literal["data", "task"] = "data",
        on_repeat: Literal["replace", "add", "raise"] = "replace",
        rows: Choice = "auto",
        tasks: Sequence[str] | int | None = None,
        overlap: Overlap = "auto",
    ) -> None:
        # Optimizer.__init__ is not called: it would give this object groups and state of its own.
        missing = [name for name in _NEEDED if not hasattr(optimizer, name)]
        if missing or isinstance(optimizer, type):
            raise TypeError(
                f"optimizer must be an optimizer, with {', '.join(_NEEDED)}; found {type(optimizer).__name__}, without "
                f"{', '.join(missing) or 'an instance'}"
            )
        if method is None:
            method = methods.PCGrad(variant or "pytorch-pcgrad", reduction, generator, order)
        elif any(choice is not None for choice in (variant, reduction, generator, order)):
            raise ValueError(
                "method brings its own reduction, generator and order; found besides it "
                f"variant={variant!r}, reduction={reduction!r}, generator={generator!r}, order={order!r}"
            )
        if on_repeat not in ("replace", "add", "raise"):
            raise ValueError(f"on_repeat must be 'replace', 'add' or 'raise'; found {on_repeat!r}")
        self.optimizer = optimizer
        self.report: ConflictReport | None = None
        self._surgery = GradientSurgery(
            optimizer,
            method=method,
            tasks=1 if tasks is None else tasks,
            shared=shared,
            gram_over=gram_over,
            row_dtype=row_dtype,
            process_group=process_group,
            parallel=parallel,
            rows=rows,
            overlap=overlap,
        )
        self._on_repeat = on_repeat
        self._is_unused = False  # whether no step has used the merged gradient
        self._given_warnings: set[str] = set()
        self._opt_called = False
        self._follow_steps()

    def _follow_steps(self) -> None:
        """Notice each step, also where not this object but the wrapped optimizer is asked to make it."""
        self._is_told_of_steps = False
        inner = self.optimizer
        while not hasattr(inner, "_optimizer_step_post_hooks"):  # as those that trainers wrap have none of their own
            if not hasattr(inner, "optimizer"):
                return
            inner = inner.optimizer
        note = inner.register_step_post_hook(_note_step(weakref.ref(self)))
        weakref.finalize(self, note.remove)
        self._is_told_of_steps = True

    @not_compiled
    def pc_backward(
        self, objectives: Sequence[Tensor | None] | Mapping[Any, Tensor | None] | Tensor, retain_graph: bool = False
    ) -> None:
        """Run each task loss backward and replace ``.grad`` by the merged gradient.

        Args:
            objectives: T scalar losses, None for a task that is absent or another process', or one tensor ``[T]`` or
                ``[T, 1]``; they may share a graph. Elements of a tensor share at least that: a backward pass of one
                gives what only others depend on zeros, which count as a gradient. Where tasks have names, also a dict;
                one that it lacks is absent.
            retain_graph: keep the graphs for another backward pass; else the last pass frees them.
        Raises:
            TypeError: objectives that are no real floating-point tensors.
            ValueError: none given, all absent, not scalar, without grad, on several devices. ``.grad`` is not changed.
            RuntimeError: a trainer scales the losses of this optimizer, which backward passes here would pass by.
            Whatever a backward pass raises; then ``.grad`` is None where it held the last merged gradient, whose
            memory is that of the rows, and as before elsewhere.
        """
        surgery, before = self._surgery, []
        tasks_before = surgery.num_tasks
        is_small = (
            self._on_repeat == "replace"
            and not self._is_unused
            and type(objectives) in (list, tuple)
            and 1 < len(objectives) == surgery.num_tasks
            and surgery._small.takes(objectives, surgery.method, surgery.rows)
        )
        if is_small:  # losses that look like those of the last round, which were checked
            refuse_unscaled(self)
            losses = dict(enumerate(objectives))
        else:
            losses = self._checked(objectives)
            before = surgery._gradients() if self._on_repeat == "add" else []
        try:
            self.report = surgery._round(losses, retain_graph, is_small)
        except BaseException:
            surgery.discard()
            surgery.num_tasks = tasks_before
            for p, grad in before:
                p.grad = grad
            raise
        for p, grad in before:
            p.grad = grad if p.grad is None else added(p.grad, grad)
        self._is_unused = True

    def _checked(self, objectives: object) -> dict[int, Tensor]:
        """The losses that are there, before anything is changed."""
        surgery = self._surgery
        by_task = surgery._stays.processes.by_task
        with surgery._stays.telling():
            listed = in_order(objectives, surgery.num_tasks, surgery.tasks)
            losses = present_losses(listed, may_be_none=by_task)
            refuse_unscaled(self)
            if surgery.tasks and max(losses, default=0) >= len(surgery.tasks):
                raise ValueError(f"{1 + max(losses)} losses for the tasks {list(surgery.tasks)}")
        surgery.discard()
        if not (by_task or isinstance(surgery.method, methods.Tracking)):  # which may take one task a step
            warn_of_one_loss(len(losses))
        warn_of_fewer_losses(listed, surgery.method, surgery.method.known_tasks)
        self._look_for_repeat()
        counts_absent = by_task or surgery._layouts.reach is not None
        surgery.num_tasks = max(surgery.num_tasks, len(listed) if counts_absent else 1 + max(losses))
        return losses

    def _look_for_repeat(self) -> None:
        """Raise or warn where ``.grad`` still holds what the last ``pc_backward`` made."""
        is_lost = self._on_repeat == "replace" and self._is_unused and _REPLACED not in self._given_warnings
        if not is_lost and self._on_repeat != "raise":
            return
        # zero_grad(set_to_none=False) leaves zeros.
        if not any(bool(grad.any()) for grad in self._surgery._last_merged()):
            return
        if is_lost:
            self._warn(_REPLACED)
            return
        raise RuntimeError(
            "pc_backward() before the last one's gradients were cleared: call zero_grad() first, or choose "
            "on_repeat='add' or 'replace'"
        )

    def _warn(self, message: str) -> None:
        """Once for each object."""
        if message not in self._given_warnings:
            self._given_warnings.add(message)
            warn(message)

    def _note_step(self) -> None:
        self._opt_called = True  # where schedulers look
        self._is_unused = False
        if self.report is None and any(p.grad is not None for group in self.param_groups for p in group["params"]):
            self._warn(_NO_SURGERY)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer."""
        result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        if not self._is_told_of_steps:
            self._note_step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters of the wrapped optimizer."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; its parameters take part from the next surgery on."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self, *, global_generators: bool = False) -> dict[str, Any]:
        """The state of the wrapped optimizer, and under ``fastpcgrad`` that of the surgery.

        Optimizers ignore the further key, so it loads into the wrapped one, too.

        Args:
            global_generators: see ``GradientSurgery.state_dict``.
        """
        surgery = self._surgery.state_dict(global_generators=global_generators)
        return {**self.optimizer.state_dict(), _STATE_KEY: surgery}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or one of the wrapped optimizer, which leaves that of the surgery as it is.

        Raises:
            ValueError: see ``GradientSurgery.load_state_dict``; whatever the wrapped optimizer raises. The surgery is
                then as before, and the optimizer as it leaves itself.
        """
        surgery, before = state_dict.get(_STATE_KEY), None
        if surgery is not None:
            before = self._surgery.state_dict(global_generators="global_generators" in surgery)
            self._surgery.load_state_dict(surgery)
        try:
            self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != _STATE_KEY})
        except BaseException:
            if before is not None:
                self._surgery.load_state_dict(before)
            raise

    @property
    def _optim(self) -> torch.optim.Optimizer:
        """The wrapped optimizer, by the original's name for it."""
        return self.optimizer

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
        return self.__dict__.copy()  # Optimizer's own holds the wrapped one's groups and state alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow_steps()

    def __repr__(self) -> str:
        return f"PCGrad({self._surgery.method!r}, {self.optimizer!r})"


def _note_step(wrapper: weakref.ref[PCGrad]) -> Callable[..., None]:
    def note(*_: Any) -> None:
        if (alive := wrapper()) is not None:
            alive._note_step()

    return note
