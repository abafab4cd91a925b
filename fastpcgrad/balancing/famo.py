"""FAMO: weights that let all losses fall at the same rate, from losses before and after each step alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from .._named import named
from .base import LearnedBalancer, Losses, OptimizerFactory, all_finite, task_values

_DECAYS = {"libmtl": 1e-3, "famo": 1e-2, "famo-experiments": 1e-5}
"""γ of the published codes."""


class FAMO(LearnedBalancer):
    """Weights c z_i / D_i with z = softmax(ξ), D_i = L_i − min_i and c = 1 / Σ_j z_j / D_j, so that they sum to 1.

    Their weighted losses have the gradient of c Σ z_i log D_i. After the optimizer's step, ``update`` is given the
    losses of the same batch again and moves ξ by how much log D_i fell: a task that fell less weighs more.

    Args:
        num_tasks, tasks, process_group: see ``Balancer``.
        min_losses: T lower bounds of the losses; None: zeros.
        optimizer: makes the optimizer of ξ: the paper's β is its ``lr``, γ its ``weight_decay``. None: Adam with 0.025
            and the variant's γ.
        variant: whose γ: ``libmtl``: LibMTL's 1e-3. ``famo``: 1e-2, the authors' package. ``famo-experiments``: 1e-5,
            the code of the paper's experiments. Both of the authors' also clip the gradient of what is shared to norm
            1, which is left to the training loop.
    Attributes:
        logits: ξ, ``[T]``, starts at 0.
        weights: those of the last call whose losses were finite; 1/T before it.
    Raises:
        TypeError: ``optimizer`` makes none.
        ValueError: ``min_losses`` are not T finite numbers; unknown variant, or one besides ``optimizer``.
    Numerics: 1e-8 is added to each D_i. A call with a loss that is not finite weighs by the weights of the call before
        it, and the update after it is skipped. A loss below its ``min_losses`` is an error of the call that was given
        it; see ``Balancer``.
    Source: Liu et al. 2023, arXiv:2306.03792, Alg. 1.
    Example:
        >>> balancer = fastpcgrad.balancing.FAMO(2)
        >>> balancer(torch.tensor([1.0, 4.0]))
        tensor([0.8000, 0.8000])
        >>> balancer.update(torch.tensor([0.5, 4.0]))  # after the step the first loss has fallen, the second has not
        >>> balancer.logits.data
        tensor([-0.0250,  0.0250])
    """

    min_losses: Tensor

    def __init__(
        self,
        num_tasks: int | None = None,
        min_losses: Iterable[float] | Tensor | None = None,
        optimizer: OptimizerFactory | None = None,
        *,
        variant: str | None = None,
        tasks: Sequence[str] | int | None = None,
        process_group: object = "auto",
    ) -> None:
        super().__init__(num_tasks, process_group, tasks=tasks)
        decay = named("variant", variant or "libmtl", _DECAYS)
        if variant is not None and optimizer is not None:
            raise ValueError(
                f"variant is the weight decay of the optimizer; found variant={variant!r} and an optimizer"
            )
        least = task_values("min_losses", [0.0] * self.num_tasks if min_losses is None else min_losses, self.num_tasks)
        self.register_buffer("min_losses", least)
        self.logits = self._learn(
            torch.zeros_like(least), optimizer or partial(torch.optim.Adam, lr=0.025, weight_decay=decay)
        )
        self.register_buffer("weights", torch.full_like(least, 1 / self.num_tasks), persistent=False)
        self._before: Tensor | None = None

    def weigh(self, losses: Tensor) -> Tensor:
        excess = self._excess(losses)
        self._before = excess.log()
        shares = torch.softmax(self.logits, dim=0) / excess
        weights = shares / shares.sum()
        self.weights = torch.where(all_finite(losses) & (excess > 0).all(), weights, self.weights)
        return self.weights

    def update(self, losses: Losses) -> None:
        """Move ξ, once after each step.

        Args:
            losses: those of the same batch, computed again after the optimizer's step; see ``forward``.
        Raises:
            TypeError, ValueError: see ``forward``. Nothing is changed.
            RuntimeError: no call since the last update.
        """
        self._refusals.raise_due()
        found = self._vector("losses", self._listed(losses))
        after = self._excess(self._mean(found)).log()
        if self._before is None:
            raise RuntimeError("update() needs the losses before the step: call the balancer with them first")
        fall = self._before - after
        shares = torch.softmax(self.logits, dim=0)
        self._step(self.logits, shares * (fall - shares @ fall))  # the softmax's Jacobian times the falls
        self._before = None

    def _excess(self, losses: Tensor) -> Tensor:
        excess = losses - self.min_losses + 1e-8
        bad = all_finite(losses) & ~(excess > 0)
        self._refusals.refuse(bad, (losses, self.min_losses), _why_not)
        return excess


def _why_not(task: int, values: list[float]) -> str:
    loss, least = values
    return (
        f"losses[{task}] is {loss:.6g} and its min_losses {least:.6g}: FAMO takes log(L − min_losses + 1e-8); give "
        "lower bounds as min_losses, or take STCH, which takes losses of any sign"
    )
