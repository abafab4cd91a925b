"""ExcessMTL: tasks that are furthest from their optimum, by an estimate from squared gradients, weigh most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._count import count
from ._shares import Shares
from .base import Solution
from .tracking import Row, Tracked, Tracking, by_task, check_count, loaded_shares, squares_fit

_EPS = 1e-7
"""Under the root, and added to what is divided by, as in the authors' code."""


class ExcessMTL(Tracking):
    """Weights that grow with each task's excess risk, how far its loss is from the least that it could be.

    The estimate is E_t = Σ_n g_tn² / √(S_tn + 1e-7), where S_t sums up the squares of all steps: of second order, with
    AdaGrad's Hessian. α_t ← α_t exp(η Ê_t), scaled to sum 1, where Ê_t is E_t by its baseline; the merged gradient is
    Σ_t α_t g_t. The baseline is the mean of E_t over the warmup; without one it is the first E_t, which is not divided
    in its own step.

    State: see ``Tracking``, where what is kept is S; besides α, ``weights``, and the baselines, by the index of the
    task. In a step where tasks are absent, the others share what is theirs; a task that comes after the warmup has its
    first E_t for a baseline.

    Args:
        robust_step_size: η, positive.
        n_warmup_steps: the steps in which α stays as it is; the paper takes 3 epochs.
    Raises:
        TypeError, ValueError: an argument is out of range. When merging: see ``Tracking``.
    Numerics: see ``Tracking``; E in float64. Squares must be numbers of the dtype of S: a gradient of more than 1e16 in
        fp32 is one that is not finite.
    Source: He et al. 2024, Robust Multi-Task Learning with Excess Risks, PMLR 235, eq. 6, 7, 9, as TorchJD has it: α
        begins with 1/T, where LibMTL's begins with 1. Oracle: ``reference.excess_mtl``.
    Example:
        >>> x = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = fastpcgrad.PCGrad(torch.optim.SGD([x], lr=0.1), method=fastpcgrad.methods.ExcessMTL())
        >>> optimizer.pc_backward([(x[0] - 1).square(), (x[1] - 2).square()])
        >>> x.grad
        tensor([-0.2384, -3.5232])
    """

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        if not 0 < robust_step_size < float("inf"):
            raise ValueError(f"robust_step_size must be finite and positive; found {robust_step_size!r}")
        self.robust_step_size = robust_step_size
        self.n_warmup_steps = count("n_warmup_steps", n_warmup_steps, 0)
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self._shares = Shares()
        self._baselines: dict[int, tuple[float, int]] = {}  # a sum of E_t, and of how many steps

    def track(self, tasks: Sequence[int], rows: Sequence[Row], gram: Tensor, losses: Sequence[float]) -> Tracked | None:
        if not squares_fit(rows, gram):
            return None
        risks = torch.stack([self._risk(task, row, gram) for task, row in zip(tasks, rows, strict=True)]).tolist()
        self._step += 1
        if self._step <= self.n_warmup_steps:
            for task, risk in zip(tasks, risks, strict=True):
                total, steps = self._baselines.get(task, (0.0, 0))
                self._baselines[task] = total + risk, steps + 1
        else:
            scaled = torch.tensor(list(map(self._scaled, tasks, risks)), dtype=torch.float64).to(gram.device)
            shares = self._shares.of(gram, tasks)
            self._shares.put(torch.softmax(shares.log() + self.robust_step_size * scaled, dim=-1), tasks)
        return Tracked(tasks, rows)

    def _risk(self, task: int, row: Row, gram: Tensor) -> Tensor:
        """E_t, once S has the squares of this step, on the device of ``gram``."""
        total = gram.new_zeros(())
        for own, grad in zip(self.kept(task, row), row, strict=True):
            if own is not None and grad is not None:
                squares = grad.to(own.dtype).square()
                own.add_(squares)
                total += squares.div_((own + _EPS).sqrt_()).sum(dtype=torch.float64).to(total.device)
        return total

    def _scaled(self, task: int, risk: float) -> float:
        """Ê_t; a task without a baseline gets one."""
        if task not in self._baselines:
            self._baselines[task] = risk, 1
            return risk
        total, steps = self._baselines[task]
        return risk / (total / steps + _EPS)

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        return Solution(self._shares.of(gram, tasks), None)

    state_keys = (*Tracking.state_keys, "weights", "baselines")

    def state_dict(self) -> dict[str, Any]:
        """See ``Tracking``; ``weights``: α, ``[T]`` float64 of mean 1, or None; ``baselines``: of each task by its
        index a sum of E_t, and of how many steps it is."""
        return {**super().state_dict(), "weights": self._shares.state(), "baselines": dict(self._baselines)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_state(state)
        shares, baselines = loaded_shares("weights", state["weights"]), {}
        for task, baseline in by_task("baselines", state["baselines"]):
            if not isinstance(baseline, list | tuple) or len(baseline) != 2:
                raise ValueError(f"baselines[{task}] must be a sum and a number of steps; found {baseline!r}")
            total, steps = baseline
            check_count(f"baselines[{task}][1]", steps, 1)
            if not isinstance(total, int | float):
                raise ValueError(f"baselines[{task}][0] must be a number; found {total!r}")
            baselines[task] = float(total), steps
        super().load_state_dict(state)
        self._shares, self._baselines = shares, baselines

    def __repr__(self) -> str:
        return f"ExcessMTL(robust_step_size={self.robust_step_size!r}, n_warmup_steps={self.n_warmup_steps})"
