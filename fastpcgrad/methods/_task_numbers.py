"""What a method keeps for each task from one step to the next: a number, or an average of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import to_device


class TaskNumbers:
    """A number for each task of each problem, kept by the task's index.

    Attributes:
        values: ``[T]``, or ``[S, T]`` of several problems, float64; ``missing`` where a task has none. None: none has.
    """

    missing = torch.nan

    def __init__(self) -> None:
        self.values: Tensor | None = None

    @property
    def known_tasks(self) -> int:
        return 0 if self.values is None else self.values.shape[-1]

    def check(self, gram: Tensor) -> None:
        """For ``Method.solve``, which is not told the indices: ValueError where there are other tasks or problems."""
        if self.values is not None and self.values.shape != gram.shape[:-1]:
            raise self._none_for(gram)

    def of(self, gram: Tensor, tasks: Sequence[int]) -> Tensor:
        """Those of ``tasks``, in the shape of their weights, on the device of ``gram``.

        Raises:
            ValueError: they are of another number of problems.
        """
        if self.values is not None and self.values.shape[:-1] != gram.shape[:-2]:
            raise self._none_for(gram)
        return self.like(gram[..., 0], tasks)

    def like(self, weights: Tensor, tasks: Sequence[int]) -> Tensor:
        """``of`` by the problems and the device of weights."""
        if self.values is None:
            return weights.new_full((*weights.shape[:-1], len(tasks)), self.missing)
        self._make_room(tasks)
        return to_device(self.values, weights.device)[..., places(tasks, weights.device)]

    def keep(self, numbers: Tensor, tasks: Sequence[int]) -> None:
        """``numbers``, in the shape of weights, for ``tasks``; those of others stay."""
        if self.values is None:
            self.values = numbers.new_full((*numbers.shape[:-1], 0), self.missing)
        self._make_room(tasks)
        values = to_device(self.values, numbers.device).clone()
        values[..., places(tasks, numbers.device)] = numbers
        self.values = values

    def _make_room(self, tasks: Sequence[int]) -> None:
        assert self.values is not None
        new = 1 + max(tasks, default=-1) - self.values.shape[-1]
        if new > 0:
            self.values = torch.nn.functional.pad(self.values, (0, new), value=self.missing)

    def _none_for(self, gram: Tensor) -> ValueError:
        assert self.values is not None
        found, known = list(gram.shape), list(self.values.shape)
        return ValueError(
            f"gram is {found}, what is kept for each task of each problem is {known}; call reset() when they change"
        )

    def state(self) -> Tensor | None:
        """For ``state_dict``."""
        return None if self.values is None else self.values.clone()

    def load(self, name: str, state: object) -> None:
        """What ``state`` gave.

        Raises:
            ValueError: not None, nor float64 ``[T]`` or ``[S, T]``.
        """
        if state is not None and not isinstance(state, Tensor):
            raise ValueError(f"{name} must be a tensor or None; found {state!r}")
        if state is not None and (state.dtype != torch.float64 or state.dim() not in (1, 2)):
            raise ValueError(f"{name} must be float64 [T] or [S, T]; found {state.dtype} {list(state.shape)}")
        self.values = None if state is None else state.detach().clone()


class TaskAverages:
    """Of a number for each task an exponential average that begins at 0 and is corrected for it, over the steps in
    which the task was there.

    Args:
        beta: β in [0, 1): v ← β v + (1 − β) x, and v / (1 − βⁿ) after n steps.
    Raises:
        ValueError: ``beta`` out of range.
    """

    def __init__(self, beta: float) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1); found {beta!r}")
        self.beta = beta
        self.reset()

    def reset(self) -> None:
        self.averages, self.steps = TaskNumbers(), TaskNumbers()

    @property
    def known_tasks(self) -> int:
        return self.averages.known_tasks

    def after(self, numbers: Tensor, gram: Tensor, tasks: Sequence[int]) -> Tensor:
        """The corrected averages after a step with ``numbers``, in the shape of weights.

        A problem with a number that is not finite stays as it was, and its averages are NaN.
        """
        known, counted = self.averages.of(gram, tasks), self.steps.of(gram, tasks)
        averages = self.beta * known.nan_to_num(0.0) + (1 - self.beta) * numbers
        steps = counted.nan_to_num(0.0) + 1
        finite = numbers.isfinite().all(dim=-1, keepdim=True)
        self.averages.keep(torch.where(finite, averages, known), tasks)
        self.steps.keep(torch.where(finite, steps, counted), tasks)
        return torch.where(finite, averages / (1 - self.beta**steps), torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """``averages``, v, and ``steps``, n: each None before the first step."""
        return {"averages": self.averages.state(), "steps": self.steps.state()}

    def load_state_dict(self, of: str, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave.

        Raises:
            ValueError: other keys than a state of ``of`` has, or values that are none of it.
        """
        if set(state) != {"averages", "steps"}:
            raise ValueError(f"the state of {of} has the keys averages and steps; found {sorted(state)}")
        loaded = TaskAverages(self.beta)
        loaded.averages.load("averages", state["averages"])
        loaded.steps.load("steps", state["steps"])
        if getattr(state["averages"], "shape", None) != getattr(state["steps"], "shape", None):
            raise ValueError("averages and steps must be of the same tasks and problems")
        self.averages, self.steps = loaded.averages, loaded.steps


def places(tasks: Sequence[int], device: torch.device) -> Tensor:
    """The indices of tasks, to index a tensor on ``device`` with."""
    return to_device(torch.tensor(tasks, dtype=torch.int64), device)
