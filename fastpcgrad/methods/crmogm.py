"""CR-MOGM: the weights of another method, averaged over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._modes import is_fake
from .._ops import to_device
from ..variants import Generator
from ._task_numbers import TaskNumbers
from ._task_vector import TaskVector, check_length, shown, task_vector
from .base import Method, Solution
from .solvers.problems import check_gram


class CRMOGM(Method):
    """λ ← α λ + (1 − α) λ̂ with the weights λ̂ that another method makes of G, and λ for the merged gradient.

    With stochastic gradients the weights of MGDA and its like are biased and jump from step to step; averaged with an
    α that goes to 1 as the learning rate goes to 0 they converge. λ of the first step is λ̂, or comes after
    ``initial_weights``.

    State: λ, and the state of the method, under ``method.`` and its names. λ belongs to tasks by their indices: that of
    an absent task stays as it is, and a task that is new begins with its λ̂. Else as in ``GradVac``: ``solve`` raises
    for another number of tasks, and so do both for another number of problems; ``reset`` starts over.

    Args:
        method: any that makes weights of G.
        alpha: α in [0, 1]; 0 is the method itself, 1 keeps the first weights. May be set anew between steps:
            ``method.alpha = 1 - lr / initial_lr`` as the paper's corollary 1 has it.
        initial_weights: λ before the first step, ``[T]``; None: λ̂ of the first.
    Raises:
        TypeError: no method, or one that works on the rows (GradDrop, MoCo), of which there are no weights.
        ValueError: ``alpha`` out of range, bad weights. From ``solve``: the state is for another shape.
    Numerics: float64 on the device of G, without a wait of its own. Weights that are not finite are given as they are,
        and λ of that problem stays as it was.
    Source: Zhou et al. 2022, On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond,
        NeurIPS, Alg. 1. Oracle: ``reference.averaged_weights``.
    Example:
        >>> method = fastpcgrad.methods.CRMOGM(fastpcgrad.methods.MGDA(), alpha=0.5)
        >>> for norms in ([1.0, 4.0], [4.0, 1.0]):
        ...     weights = method.weights(torch.diag(torch.tensor(norms, dtype=torch.float64)))
        >>> weights  # the mean of (0.8, 0.2) and (0.2, 0.8)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, method: Method, alpha: float = 0.9, initial_weights: TaskVector | None = None) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be a fastpcgrad.methods.Method; found {method!r}")
        if method.needs_rows:
            raise TypeError(f"method must make weights of G, to be averaged; found {method!r}, which works on the rows")
        self.method = method
        self.alpha = alpha
        self.initial_weights = None if initial_weights is None else task_vector("initial_weights", initial_weights)
        self._average = TaskNumbers()

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"alpha must be in [0, 1]; found {value!r}")
        self._alpha = value

    @property
    def scope(self) -> Literal["all", "shared", "parameter"]:  # type: ignore[override]
        return self.method.scope

    @property
    def generator(self) -> Generator | None:  # type: ignore[override]
        return self.method.generator

    @property
    def known_tasks(self) -> int:
        return max(self._average.known_tasks, self.method.known_tasks)

    def reset(self) -> None:
        """Forget λ, and what the method keeps."""
        self._average = TaskNumbers()
        self.method.reset()

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        self._average.check(gram)
        if self.initial_weights is not None:
            check_length("initial_weights", self.initial_weights, gram.shape[-1])
        return self._averaged(gram, range(gram.shape[-1]), self.method.solve(gram))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        return self._averaged(gram, tasks, self.method.solve_for(gram, tasks))

    def _averaged(self, gram: Tensor, tasks: Sequence[int], solution: Solution) -> Solution:
        new = solution.weights
        if is_fake(gram):  # the state is that of real steps
            return Solution(new, None)
        known = self._average.of(gram, tasks)
        before = torch.where(known.isnan(), self._initial(new, tasks), known)
        finite = new.isfinite().all(dim=-1, keepdim=True)
        weights = self.alpha * before + (1 - self.alpha) * new
        self._average.keep(torch.where(finite, weights, known), tasks)
        return Solution(torch.where(finite, weights, new), None)

    def _initial(self, new: Tensor, tasks: Sequence[int]) -> Tensor:
        initial = self.initial_weights
        if initial is None:
            return new
        if len(initial) <= max(tasks, default=-1):
            raise ValueError(f"initial_weights has {len(initial)} numbers, one a task; found task {max(tasks)}")
        return to_device(initial[list(tasks)], new.device)

    def partial_weights(self, weights: Tensor) -> Tensor:
        return self.method.partial_weights(weights)

    def state_dict(self) -> dict[str, Any]:
        """``average``: λ, float64, or None before the first step; and the method's, under ``method.`` and its names."""
        inner = {f"method.{key}": value for key, value in self.method.state_dict().items()}
        return {"average": self._average.state(), **inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` gave.

        Raises:
            ValueError: other keys, λ is not float64 ``[T]`` or ``[S, T]``, or what the method raises.
        """
        inner = {key.removeprefix("method."): value for key, value in state.items() if key.startswith("method.")}
        if "average" not in state or len(inner) + 1 != len(state):
            raise ValueError(f"the state of CRMOGM has average and what begins with method.; found {sorted(state)}")
        average = TaskNumbers()
        average.load("average", state["average"])
        self.method.load_state_dict(inner)
        self._average = average

    def __repr__(self) -> str:
        initial = shown(self.initial_weights)
        return f"CRMOGM({self.method!r}, alpha={self.alpha!r}, initial_weights={initial})"
