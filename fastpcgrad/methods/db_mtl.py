"""DB-MTL: running averages of the task gradients, all made as long as the longest, then summed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Solution
from .tracking import Row, Tracked, Tracking

_EPS = 1e-8
"""Added to the norms, as in LibMTL."""


class DBMTL(Tracking):
    """The sum of averaged task gradients, each scaled to the length of the longest.

    In step k, b_t ← g_t + β_k (b_t − g_t) with β_k = ``beta``/k^``beta_sigma``; the merged gradient is Σ_t α_t b_t with
    α_t = max_s ‖b_s‖ / ‖b_t‖.

    It is the gradient half of DB-MTL, whose losses are logarithms: ``balancing.Logarithm`` makes the whole,
    ``optimizer.pc_backward(logarithm(losses))``.

    State: see ``Tracking``.

    Args:
        beta, beta_sigma: of the averages; β_1 in [0, 1), 0: no averages.
    Raises:
        ValueError: an argument is out of range. When merging: see ``Tracking``.
    Numerics: see ``Tracking``. 1e-8 is added to ‖b_t‖.
    Source: Lin et al. 2023, Dual-Balancing for Multi-Task Learning, arXiv:2308.12029, Alg. 1, as LibMTL has it. Oracle:
        ``reference.db_mtl``.
    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> method, logarithm = fastpcgrad.methods.DBMTL(beta=0.0), fastpcgrad.balancing.Logarithm(2)
        >>> optimizer = fastpcgrad.PCGrad(torch.optim.SGD([x], lr=0.1), method=method)
        >>> optimizer.pc_backward(logarithm([x[0].square(), x[1].square()]))
        >>> x.grad
        tensor([2., 2.])
    """

    def __init__(self, beta: float = 0.9, beta_sigma: float = 0.0) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1); found {beta!r}")
        if not 0 <= beta_sigma < float("inf"):
            raise ValueError(f"beta_sigma must be finite and not negative; found {beta_sigma!r}")
        self.beta, self.beta_sigma = beta, beta_sigma
        super().__init__()

    def track(self, tasks: Sequence[int], rows: Sequence[Row], gram: Tensor, losses: Sequence[float]) -> Tracked:
        self._step += 1
        beta = self.beta / self._step**self.beta_sigma
        return Tracked(tasks, self.averaged(tasks, rows, beta, [1 - beta] * len(tasks)))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        norms = gram.diagonal().sqrt()
        return Solution(norms.max() / (norms + _EPS), None)

    def __repr__(self) -> str:
        return f"DBMTL(beta={self.beta!r}, beta_sigma={self.beta_sigma!r})"
