"""MetaBalance: auxiliary gradients brought to the length of the main one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._modes import is_fake
from ._main_task import check_main
from ._task_numbers import TaskAverages
from .base import Method, Solution
from .solvers.problems import check_gram


class MetaBalance(Method):
    """Sum the task gradients, those of auxiliary tasks scaled to the average length of that of task 0, the main one.

    m_t ← β m_t + (1 − β) ‖g_t‖, and w_t = r m_0 / m_t + 1 − r. As published each parameter is balanced by itself:
    ``GradientSurgery(..., method=MetaBalance(), granularity="parameter")``; without, lengths are those of all shared
    parameters. The merged gradient scales with the gradients where all steps do.

    Parameters that some task does not touch are summed, unless ``shared=`` names those that are balanced: name them
    where tasks may be absent, so that which are does not change with these.

    State: m and how many steps of each task are in it, ``[T]`` or ``[S, T]``, by the indices of tasks. An absent task
    keeps its own, and a task that is new begins with its present length, as all do in the first step. ``solve`` is not
    told the indices: another number of tasks raises there, and another number of problems everywhere; ``reset`` starts
    over.

    Args:
        relax_factor: r in [0, 1]: 0 is the sum, 1 makes all as long as the main one.
        beta: β in [0, 1), how slowly m follows.
    Raises:
        ValueError: an argument is out of range. From ``solve``: task 0 is absent, or the state is for another shape.
    Numerics: float64 on the device of G, where nothing waits. A gradient that has always been zero has weight 1 − r.
        NaN or inf in G gives NaN weights and leaves m of that problem as it was.
    Source: He et al. 2022, MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of
        Auxiliary Tasks, arXiv:2203.06801, Alg. 1. Oracle: ``reference.metabalance``.
    Example:
        >>> G = torch.diag(torch.tensor([1.0, 16.0], dtype=torch.float64))
        >>> fastpcgrad.methods.MetaBalance(relax_factor=0.5).weights(G)  # ½ · ¼ + ½
        tensor([1.0000, 0.6250], dtype=torch.float64)
    """

    scope: Literal["all", "shared", "parameter"] = "shared"

    def __init__(self, relax_factor: float = 0.7, beta: float = 0.9) -> None:
        if not 0 <= relax_factor <= 1:
            raise ValueError(f"relax_factor must be in [0, 1]; found {relax_factor!r}")
        self.relax_factor = relax_factor
        self.beta = beta
        self._magnitudes = TaskAverages(beta)

    def reset(self) -> None:
        """Forget the lengths."""
        self._magnitudes.reset()

    @property
    def known_tasks(self) -> int:
        return self._magnitudes.known_tasks

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        self._magnitudes.averages.check(gram)
        return self.solve_for(gram, range(gram.shape[-1]))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        check_gram(gram)
        check_main(self, "main task", tasks)
        if is_fake(gram):  # the state is that of real steps
            return Solution(gram.new_empty(gram.shape[:-1]), None)
        # What is not finite anywhere in G is to be seen, and not to be kept.
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt() + 0 * gram.sum(dim=-1)
        lengths = self._magnitudes.after(norms, gram, tasks)
        ratios = torch.where(lengths == 0, 0.0, lengths[..., :1] / lengths)
        return Solution(self.relax_factor * ratios + (1 - self.relax_factor), None)

    def state_dict(self) -> dict[str, Any]:
        """``averages``, m before its correction, and ``steps``: float64, or None before the first step."""
        return self._magnitudes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` gave.

        Raises:
            ValueError: other keys, or no float64 ``[T]`` or ``[S, T]``, both of the same shape.
        """
        self._magnitudes.load_state_dict("MetaBalance", state)

    def __repr__(self) -> str:
        return f"MetaBalance(relax_factor={self.relax_factor!r}, beta={self.beta!r})"
