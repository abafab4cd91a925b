"""PCD: the main gradient, turned as little as lets every other task progress by a share of what it could."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._modes import is_fake, refuse_tracers
from .._ops import to_device
from ._main_task import check_main
from ._task_numbers import TaskAverages
from ._task_vector import TaskVector, task_vector
from .base import Method, Solution
from .solvers.problems import Array, check_gram

_EPS = float(np.finfo(np.float64).eps)


class PCD(Method):
    """Priority-constrained descent: task 0 is the main one, and each other task j gets its share τ_j of progress.

    With ĝ_t = g_t / √(v̂_t + ε), v̂ the average of ‖g_t‖² over the steps, d is the vector nearest to ĝ_0 that has
    ĝ_j·d ≥ τ_j ‖ĝ_j‖² for all others, brought to the length of g_0. Where no vector has all these, it is g_0; where
    d is zero, or g_0, it is zero.

    State: v and how many steps of each task are in it, ``[T]`` or ``[S, T]``, by the indices of tasks; see
    ``MetaBalance``.

    Args:
        tau: τ in [0, 1], one for all other tasks or ``[T - 1]``.
        beta: β in [0, 1), how slowly v follows.
        eps: ε, not negative. It is absolute: tasks with ‖g_t‖² near it count for less. 0 by default, so that the
            merged gradient scales with the gradients where all steps do; TorchJD has 1e-8.
    Raises:
        TypeError, ValueError: an argument is out of range. From ``solve``: task 0 is absent, a number of tasks that
            does not fit ``tau``, or the state is for another shape.
    Numerics: Goldfarb and Idnani's dual active set method in NumPy on the host, which waits for the device of G. A task
        gradient nearer than 1e-6 of its norm to the span of those whose shares bind counts as dependent on them. NaN or
        inf in G gives NaN weights and leaves v of that problem as it was.
    Source: Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
        Optimization, TMLR 2026, arXiv:2606.29521; Goldfarb and Idnani 1983, doi:10.1007/BF02591962. Oracle:
        ``reference.pcd``.
    Example:
        >>> G = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
        >>> weights = fastpcgrad.methods.PCD(tau=0.0).weights(G)
        >>> weights / weights[0]  # g_0 + ½ g_1 is at right angles to g_1
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, tau: float | TaskVector = 0.02, beta: float = 0.999, eps: float = 0.0) -> None:
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and not negative; found {eps!r}")
        self.tau = float(tau) if isinstance(tau, int | float) else task_vector("tau", tau)
        if not ((torch.as_tensor(self.tau) >= 0) & (torch.as_tensor(self.tau) <= 1)).all():
            raise ValueError(f"tau must be in [0, 1]; found {tau!r}")
        self.beta = beta
        self.eps = eps
        self._squares = TaskAverages(beta)

    def reset(self) -> None:
        """Forget the averages."""
        self._squares.reset()

    @property
    def known_tasks(self) -> int:
        return self._squares.known_tasks

    def solve(self, gram: Tensor) -> Solution:
        tasks = check_gram(gram)[-1]
        self._squares.averages.check(gram)
        if isinstance(self.tau, Tensor) and len(self.tau) != tasks - 1:
            raise ValueError(f"tau has {len(self.tau)} numbers, one for each task but the first; found {tasks} tasks")
        return self.solve_for(gram, range(tasks))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        check_gram(gram)
        check_main(self, "main task", tasks)
        refuse_tracers(gram)
        if is_fake(gram):  # the state is that of real steps
            return Solution(gram.new_empty(gram.shape[:-1]), None)
        host, shares = gram.detach().cpu(), self._shares(tasks)
        # What is not finite anywhere in G is to be seen, and not to be kept.
        squared = host.diagonal(dim1=-2, dim2=-1) + 0 * host.sum(dim=-1)
        means = self._squares.after(squared, host, tasks) + self.eps
        scales = torch.where(means == 0, 0.0, means.rsqrt())
        each = (host * scales[..., :, None] * scales[..., None, :]).reshape(-1, len(tasks), len(tasks)).numpy()
        found = torch.from_numpy(np.stack([_direction(problem, shares) for problem in each], axis=0))
        lengths = host[..., 0, 0].sqrt()[..., None]
        return Solution(to_device(found.reshape(scales.shape) * scales * lengths, gram.device), None)

    def _shares(self, tasks: Sequence[int]) -> Array:
        """τ of each of the other tasks."""
        others = [task - 1 for task in tasks[1:]]
        if not isinstance(self.tau, Tensor):
            return np.full(len(others), self.tau)
        if others and len(self.tau) <= max(others):
            raise ValueError(
                f"tau has {len(self.tau)} numbers, one for each task but the first; found task {tasks[-1]}"
            )
        return self.tau.numpy()[others]

    def state_dict(self) -> dict[str, Any]:
        """``averages``, v before its correction, and ``steps``: float64, or None before the first step."""
        return self._squares.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` gave.

        Raises:
            ValueError: other keys, or no float64 ``[T]`` or ``[S, T]``, both of the same shape.
        """
        self._squares.load_state_dict("PCD", state)

    def __repr__(self) -> str:
        tau = self.tau.tolist() if isinstance(self.tau, Tensor) else self.tau
        return f"PCD(tau={tau!r}, beta={self.beta!r}, eps={self.eps!r})"


def _direction(gram: Array, shares: Array) -> Array:
    """Weights of a unit vector along d, ``[T]``; zeros where d or g_0 is zero."""
    if not np.isfinite(gram).all():
        return np.full(len(gram), np.nan)
    weights = np.zeros(len(gram))
    if not gram[0, 0] > 0:
        return weights
    weights[0] = 1.0
    norms = np.sqrt(gram.diagonal())
    there = norms > 0
    there[0] = False
    inverse = 1 / norms[there]
    lacking = shares[there[1:]] * norms[there] - gram[0, there] * inverse
    weights[there] = _multipliers(gram[np.ix_(there, there)] * inverse[:, None] * inverse, lacking) * inverse
    squared = weights @ gram @ weights
    if not squared > 10 * _EPS * (np.abs(weights) @ norms) ** 2:
        return np.zeros(len(gram))
    return weights / np.sqrt(squared)


def _multipliers(gram: Array, lacking: Array) -> Array:
    """μ ≥ 0 of the shortest Σ_j μ_j u_j with u_j·(Σ_k μ_k u_k) ≥ b_j, ``[M]``; zeros where there is none.

    One constraint at a time is made to hold; one whose multiplier falls to 0 on the way is let go.

    Args:
        gram: of unit vectors u, ``[M, M]``.
        lacking: b, ``[M]``.
    """
    multipliers, active = np.zeros(len(lacking)), np.zeros(len(lacking), dtype=bool)
    entering = -1
    for _ in range(16 * len(lacking) + 32):  # some T do; rounding must not make it endless
        missing = np.where(active, 0.0, lacking - gram @ multipliers)
        if entering < 0:
            rounding = 16 * _EPS * len(lacking) * (1 + np.abs(lacking).max(initial=0.0) + multipliers.sum())
            entering = int(missing.argmax()) if (missing > rounding).any() else -1
            if entering < 0:
                break
        # To raise that of the entering by 1 takes these off the others, and gains this for its constraint.
        taken = np.zeros(len(lacking))
        taken[active] = np.linalg.solve(gram[np.ix_(active, active)], gram[active, entering])
        gained = gram[entering, entering] - gram[entering] @ taken
        step = missing[entering] / gained if gained > 1e-12 else np.inf
        falling = taken > 0
        ends = np.divide(multipliers, taken, out=np.full(len(lacking), np.inf), where=falling)
        first = int(ends.argmin())
        if step == ends[first] == np.inf:
            return np.zeros(len(lacking))
        multipliers = multipliers - min(step, ends[first]) * taken
        multipliers[entering] += min(step, ends[first])
        if step <= ends[first]:
            active[entering], entering = True, -1
        else:
            multipliers[first], active[first] = 0.0, False
    return multipliers.clip(min=0.0)
