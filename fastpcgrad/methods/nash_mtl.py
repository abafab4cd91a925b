"""Nash-MTL: the Nash bargaining solution among the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._modes import is_fake
from ._count import count
from .base import Method, Solution
from .solvers import fairness
from .solvers.problems import Array, Flags, check_gram, compiled, from_host, on_host


class NashMTL(Method):
    """Weights w > 0 with G w = 1/w, then the merged gradient shortened to ``max_norm``.

    Each task gains w_i g_i·d = 1, so the merged gradient d has the length √T, or ``max_norm``, however long the task
    gradients are: a loss scaled for mixed precision must be unscaled before, not after. Neither does the direction
    change with the lengths of single task gradients.

    State: the weights (before the shortening) and the number of calls, so that a run with ``update_weights_every`` > 1
    resumes where it was. Where that is 1, nothing depends on the state. The weights belong to tasks by their indices:
    in a surgery they are reused for those that are there, and found anew where one of these was absent when they were
    found. ``solve`` is not told the indices: reusing them there for another number of tasks raises, and for another
    number of problems everywhere; ``reset`` starts over.

    Args:
        max_norm: the most that ‖w J‖ may be; 0: not shortened.
        update_weights_every: solve in every such call and reuse the weights in the others; positive.
        optim_niter: the most Newton steps; positive. About 10 suffice where task gradients are not nearly dependent.
    Raises:
        ValueError: an argument is out of range. From ``solve``: weights are to be reused for another number of tasks or
            problems.
    Numerics: see ``fairness.solve``; a task without gradient gets weight 0, and at a Pareto-stationary point, where
        there is no solution, the weights are large but finite. NaN or inf in G never enters the state: the weights are
        then found in the next call. float64 on the host, where the state is; waits for the device of G.
    Source: Navon et al. 2022, Multi-Task Learning as a Bargaining Game, arXiv:2202.01017, Alg. 1.
        Oracle: ``reference.nash_mtl``.
    Example:
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.NashMTL(max_norm=0).weights(G)
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 100) -> None:
        if not max_norm >= 0:
            raise ValueError(f"max_norm must not be negative; found {max_norm!r}")
        if not update_weights_every > 0:
            raise ValueError(f"update_weights_every must be positive; found {update_weights_every!r}")
        self.max_norm = max_norm
        self.update_weights_every = update_weights_every
        self.optim_niter = count("optim_niter", optim_niter, 1)
        self.reset()

    def reset(self) -> None:
        """Forget the weights and the number of calls."""
        self._step = 0
        self._weights: Array | None = None

    @property
    def known_tasks(self) -> int:
        return 0 if self._weights is None else self._weights.shape[1]

    def _reuses_state(self) -> bool:
        return not self._due and super()._reuses_state()

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        if not self._due and self._weights is not None and self._weights.shape[1] != gram.shape[-1]:
            raise self._no_weights_for(gram.shape)
        return self.solve_for(gram, range(gram.shape[-1]))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        if is_fake(gram):  # the state is that of real steps
            return Solution(gram.new_empty(gram.shape[:-1]), None)
        problems, finite = on_host(gram)
        bargained = self._bargained(problems, finite, list(tasks))
        squared = (np.matmul(problems, bargained[:, :, None])[:, :, 0] * bargained).sum(axis=1)
        norm = np.sqrt(squared.clip(min=0))
        too_long = (norm > self.max_norm) & (self.max_norm > 0)
        weights = np.where(too_long, self.max_norm / np.where(too_long, norm, 1.0), 1.0)[:, None] * bargained
        weights[~finite] = np.nan
        return Solution(from_host(weights, gram), None)

    @property
    def _due(self) -> bool:
        return self._step % self.update_weights_every == 0

    def _bargained(self, gram: Array, finite: Flags, tasks: list[int]) -> Array:
        """The weights before the shortening, solved for or from the state."""
        known = None if self._due else self._weights
        if known is None:
            known = np.empty((len(gram), 0))
        elif len(known) != len(gram):
            raise self._no_weights_for(gram.shape)
        self._step += 1
        weights = np.full((len(gram), max(known.shape[1], 1 + max(tasks, default=-1))), np.nan)
        weights[:, : known.shape[1]] = known
        unknown = finite & np.isnan(weights[:, tasks]).any(axis=1)
        if unknown.any():
            weights[unknown] = np.nan
            weights[np.ix_(unknown.nonzero()[0], np.array(tasks))] = self._solved(gram[unknown])
        self._weights = weights
        return weights[:, tasks]

    def _solved(self, gram: Array) -> Array:
        answers = compiled(fairness.solver(1.0, self.optim_niter), torch.from_numpy(gram))
        return fairness.solve(gram, 1.0, self.optim_niter) if answers is None else answers.numpy()

    def _no_weights_for(self, shape: Sequence[int]) -> ValueError:
        assert self._weights is not None
        problems, tasks = 1 if len(shape) == 2 else shape[0], shape[-1]
        known = "{} of {}".format(*self._weights.shape)
        return ValueError(
            f"gram has {problems} problems of {tasks} tasks, the weights to reuse have {known}; call reset() when the "
            "tasks change"
        )

    def state_dict(self) -> dict[str, Any]:
        """``step``, the calls so far, and ``weights``: None or ``[S, T]`` float64 on the CPU, S = 1 for one problem.

        They are NaN for a task that was absent when they were found.
        """
        weights = None if self._weights is None else torch.from_numpy(self._weights.copy())
        return {"step": self._step, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` gave.

        Raises:
            ValueError: other keys, a step that is no count, or weights that are not ``[S, T]`` float64.
        """
        if set(state) != {"step", "weights"}:
            raise ValueError(f"the state of NashMTL has keys step and weights; found {sorted(state)}")
        step, weights = state["step"], state["weights"]
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an integer that is not negative; found {step!r}")
        if weights is not None:
            if not isinstance(weights, Tensor) or weights.dim() != 2 or weights.dtype != torch.float64:
                found = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, Tensor) else repr(weights)
                raise ValueError(f"weights must be a float64 tensor [S, T] or None; found {found}")
            weights = weights.detach().cpu().numpy().copy()
        self._step, self._weights = step, weights

    def __repr__(self) -> str:
        return (
            f"NashMTL(max_norm={self.max_norm!r}, update_weights_every={self.update_weights_every!r}, "
            f"optim_niter={self.optim_niter!r})"
        )
