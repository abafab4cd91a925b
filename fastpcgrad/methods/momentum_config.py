"""M-ConFIG: ConFIG on the momenta of the task gradients, of which a step brings one or more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._count import count
from ._task_vector import TaskVector, check_length, shown
from .base import Solution
from .conflict_free import ConFIG
from .tracking import Row, Tracked, Tracking, by_task, check_count, copied, like, loaded_row, squares_fit

_EPS = 1e-8
"""Added to the root of the second moment, as in the authors' code."""


class MConFIG(Tracking):
    """ConFIG's direction of the momenta of all tasks, each entry divided by the root of its second moment, as Adam's.

    m_t ← β₁ m_t + (1 − β₁) g_t for the tasks that are there, then ConFIG of all m_t / (1 − β₁^{n_t}), where task t was
    there n_t times. What of it is new, the pseudo-gradient, is squared into the second moment.

    So a step needs the gradient of one task alone, which costs one backward pass: give None for the others' losses, one
    task after the other. Until all have been there, the merged gradient is zero. Adam's moments are in it already: step
    with SGD.

    State: see ``Tracking``; besides the momenta, how often each task was there, and the two moments of the merged
    gradient, 2 N elements.

    Args:
        num_tasks: T.
        beta_1, beta_2: β₁ and β₂, of the momenta and of the second moment; in [0, 1).
        pref_vector: see ``ConFIG``.
    Raises:
        TypeError, ValueError: a bad argument. When merging: see ``Tracking``; a task beyond ``num_tasks``.
    Numerics: see ``Tracking``, and ``ConFIG``. Squares must be numbers of the dtype of the momenta: a gradient of more
        than 1e16 in fp32 is one that is not finite. 1e-8 is added to the root.
    Source: Liu, Chu and Thuerey 2024, arXiv:2408.11104, Alg. 1, as the authors' ``PseudoMomentumOperator`` has it.
        Oracle: ``reference.momentum_config``.
    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = fastpcgrad.PCGrad(torch.optim.SGD([x], lr=0.1), method=fastpcgrad.methods.MConFIG(2))
        >>> optimizer.pc_backward([x[0].square(), None])
        >>> x.grad
        tensor([0., 0.])
        >>> optimizer.zero_grad()
        >>> optimizer.pc_backward([None, x[1].square()])
        >>> x.grad
        tensor([1.0000, 1.0000])
    """

    def __init__(
        self, num_tasks: int, beta_1: float = 0.9, beta_2: float = 0.999, pref_vector: TaskVector | None = None
    ) -> None:
        self.num_tasks = count("num_tasks", num_tasks, 1)
        for name, value in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1); found {value!r}")
        self.beta_1, self.beta_2 = beta_1, beta_2
        self._config = ConFIG(pref_vector)
        if self.pref_vector is not None:
            check_length("pref_vector", self.pref_vector, self.num_tasks)
        super().__init__()

    @property
    def pref_vector(self) -> Tensor | None:
        """See ``ConFIG``."""
        return self._config.pref_vector

    @property
    def known_tasks(self) -> int:
        return self.num_tasks

    def reset(self) -> None:
        super().reset()
        self._times: dict[int, int] = {}
        self._pseudo: Row = []
        self._squares: Row = []

    def track(self, tasks: Sequence[int], rows: Sequence[Row], gram: Tensor, losses: Sequence[float]) -> Tracked | None:
        if max(tasks) >= self.num_tasks:
            raise ValueError(f"num_tasks is {self.num_tasks}; found the gradient of task {max(tasks)}")
        if not squares_fit(rows, gram):
            return None
        self.averaged(tasks, rows, self.beta_1, [1 - self.beta_1] * len(tasks))
        for task in tasks:
            self._times[task] = self._times.get(task, 0) + 1
        known = sorted(self._kept)
        self._step += self._is_complete
        return Tracked(known, [self._kept[task] for task in known])

    @property
    def _is_complete(self) -> bool:
        """Whether all tasks have been there."""
        return len(self._times) == self.num_tasks

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        if not self._is_complete:
            return Solution(gram.new_zeros(len(tasks)), None)
        corrections = gram.new_tensor([1 / (1 - self.beta_1 ** self._times[task]) for task in tasks])
        weights = self._config.solve(corrections[:, None] * gram * corrections).weights
        return Solution(weights * corrections, None)

    def finish(self, merged: Row) -> None:
        if not self._is_complete:
            return
        for kept in (self._pseudo, self._squares):
            kept.extend([None] * (len(merged) - len(kept)))
        first, second = 1 - self.beta_1**self._step, 1 - self.beta_2**self._step
        for index, own in enumerate(merged):
            if own is None:
                continue
            pseudo = self._pseudo[index] = like(self._pseudo[index], own)
            squares = self._squares[index] = like(self._squares[index], own)
            # of what the momentum of the merged gradient would be, the gradient that would have made it
            pseudo.mul_(-self.beta_1).add_(own, alpha=first).div_(1 - self.beta_1)
            squares.mul_(self.beta_2).addcmul_(pseudo, pseudo, value=1 - self.beta_2)
            torch.mul(own, first, out=pseudo)
            own.div_((squares / second).sqrt_().add_(_EPS))

    state_keys = (*Tracking.state_keys, "times", "pseudo", "squares")

    def state_dict(self) -> dict[str, Any]:
        """See ``Tracking``; ``times``: how often each task was there; ``pseudo`` and ``squares``: the moments of the
        merged gradient, of each parameter."""
        moments = {"pseudo": copied(self._pseudo), "squares": copied(self._squares)}
        return {**super().state_dict(), "times": dict(self._times), **moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_state(state)
        times = dict(by_task("times", state["times"]))
        for task, steps in times.items():
            check_count(f"times[{task}]", steps, 1)
        # Empty until all tasks have been there.
        moments = [loaded_row(n, state[n], state["widths"] if state[n] != [] else ()) for n in ("pseudo", "squares")]
        super().load_state_dict(state)
        self._times, (self._pseudo, self._squares) = times, moments

    def __repr__(self) -> str:
        return (
            f"MConFIG({self.num_tasks}, beta_1={self.beta_1!r}, beta_2={self.beta_2!r}, "
            f"pref_vector={shown(self.pref_vector)})"
        )
