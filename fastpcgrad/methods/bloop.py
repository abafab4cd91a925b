"""Bloop: auxiliary gradients made orthogonal to a running average of the main one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._main_task import check_main
from .base import Solution
from .tracking import Row, Tracked, Tracking


class Bloop(Tracking):
    """The gradient of task 0, the main one, and what of the others is orthogonal to an average of it.

    m ← m + ``ema`` (g₀ − m), which is g₀ in the first step, and the merged gradient is
    g₀ + λ Σ_t (g_t − (g_t·m / (m·m + ``eps``)) m) over all other tasks: to first order, a step for these leaves the
    main loss as it is, in conflict or not. The average stands for the gradient of the whole main loss, which the noise
    of one batch hides.

    State: see ``Tracking``; m alone, N elements.

    Args:
        lambda_: λ, of the auxiliary tasks; not negative.
        ema: in (0, 1]; 1: no average.
        eps: added to m·m, not negative; in the unit of squared gradients. 0: the rule has no scale of its own.
    Raises:
        ValueError: an argument is out of range. When merging: task 0 is absent; see ``Tracking``.
    Numerics: see ``Tracking``. Products with m are those of a Gram matrix; 16-bit gradients become fp32 for it.
    Source: Hsieh et al. 2024, Careful with that Scalpel: Improving Gradient Surgery with an EMA, arXiv:2402.02998,
        with the constants of the authors' code. Oracle: ``reference.bloop``.
    Example:
        >>> x = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = fastpcgrad.PCGrad(torch.optim.SGD([x], lr=0.1), method=fastpcgrad.methods.Bloop(lambda_=1.0))
        >>> optimizer.pc_backward([x[0] + 0, x[0] + x[1]])
        >>> x.grad
        tensor([1.0000, 1.0000])
    """

    def __init__(self, lambda_: float = 0.1, ema: float = 0.1, eps: float = 1e-7) -> None:
        for name, value in (("lambda_", lambda_), ("eps", eps)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative; found {value!r}")
        if not 0 < ema <= 1:
            raise ValueError(f"ema must be in (0, 1]; found {ema!r}")
        self.lambda_, self.ema, self.eps = lambda_, ema, eps
        super().__init__()

    def track(self, tasks: Sequence[int], rows: Sequence[Row], gram: Tensor, losses: Sequence[float]) -> Tracked:
        check_main(self, "main task", tasks)
        self._step += 1
        gain = 1.0 if self._step == 1 else self.ema
        (average,) = self.averaged([0], rows[:1], 1 - gain, [gain])
        wide = [
            [None if own is None else own.to(torch.promote_types(own.dtype, torch.float32)) for own in row]
            for row in rows
        ]
        return Tracked(tasks, wide, [average])

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        squared = gram[-1, -1] + self.eps
        removed = torch.where(squared > 0, gram[1:-1, -1].sum() / squared, 0.0)
        weights = gram.new_full((len(gram),), self.lambda_)
        weights[0], weights[-1] = 1.0, -self.lambda_ * removed
        return Solution(weights, None)

    def __repr__(self) -> str:
        return f"Bloop(lambda_={self.lambda_!r}, ema={self.ema!r}, eps={self.eps!r})"
