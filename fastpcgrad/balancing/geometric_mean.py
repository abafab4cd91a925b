"""The geometric mean of the losses: what counts of a loss is by which fraction it falls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import all_finite
from .scalarization import Scalarization


class GeometricMean(Scalarization):
    """Weights whose weighted sum of losses is the geometric mean (Π_i L_i)^(1/T), in value and in gradient.

    That is w_i = (Π_k L_k)^(1/T) / (T L_i). Also known as GLS, the geometric loss strategy: LibMTL's ``GLS`` and
    TorchJD's ``GeometricMean`` are this function, and give this gradient wherever their product, or its logarithm, is
    finite. The direction is that of Σ_i log L_i, so that no unit of a loss matters.

    Args:
        num_tasks, tasks, process_group: see ``Balancer``.
    Attributes:
        weights: those of the last call whose losses were finite; 1/T before it.
    Raises:
        ValueError: from a call: a loss that is not > 0, or whose weight is out of range; see ``Balancer`` for when.
    Numerics: by logarithms, so that no product under- or overflows.
    Source: Chennupati et al. 2019, MultiNet++, CVPR Workshops, arXiv:1904.08492. Oracle: ``reference.geometric_mean``.
    Example:
        >>> balancer = fastpcgrad.balancing.GeometricMean(2)
        >>> balancer(torch.tensor([1.0, 4.0])).sum()
        tensor(2.)
        >>> balancer.weights
        tensor([1.0000, 0.2500])
    """

    def __init__(
        self,
        num_tasks: int | None = None,
        *,
        tasks: Sequence[str] | int | None = None,
        process_group: object = "auto",
    ) -> None:
        super().__init__(num_tasks, process_group, tasks=tasks)
        self._begin_with(torch.full((self.num_tasks,), 1 / self.num_tasks))

    def slopes(self, losses: Tensor) -> Tensor:
        logs = losses.log()
        slopes = (logs.mean() - logs).exp() / self.num_tasks
        # A loss below 0 makes all slopes NaN: it is the one to be named.
        bad = torch.where((losses > 0).all(), ~slopes.isfinite(), losses <= 0)
        self._refusals.refuse(bad & all_finite(losses), (losses,), _why_not)
        return slopes


def _why_not(task: int, values: list[float]) -> str:
    return (
        f"losses[{task}] is {values[0]:.6g}: GeometricMean divides the mean by each loss, which has to be > 0 and not "
        "out of all proportion to the others; STCH takes losses of any sign"
    )
