"""Trimmed mean: in each column the largest and the smallest entries are left out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backends import kernels
from ._count import count
from .elementwise import Elementwise


class TrimmedMean(Elementwise):
    """In each column the mean of what is left without the ``trim_number`` largest and as many smallest entries.

    Args:
        trim_number: how many are left out at either end. Needs T ≥ 2 trim_number + 1.
    Raises:
        TypeError, ValueError: a bad count; when merging, too few tasks.
    Numerics: see ``Elementwise.aggregate``. An entry that is not finite makes its column NaN, although it would be
        trimmed away: a broken gradient must be seen.
    Source: Yin et al. 2018, Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates,
        arXiv:1803.01498, def. 2 (there β = trim_number / T). Oracle: ``reference.trimmed_mean``.
    Example:
        >>> J = torch.tensor([[1.0, 5.0], [2.0, -5.0], [9.0, 1.0]])
        >>> fastpcgrad.methods.TrimmedMean(trim_number=1).aggregate(J)
        tensor([2., 1.])
    """

    def __init__(self, trim_number: int) -> None:
        self.trim_number = count("trim_number", trim_number, 0)

    def check_tasks(self, tasks: int) -> None:
        if tasks < 2 * self.trim_number + 1:
            raise ValueError(
                f"TrimmedMean with trim_number={self.trim_number} needs at least {2 * self.trim_number + 1} task "
                f"gradients; found {tasks}"
            )

    def merge_rows(self, rows: Sequence[Tensor | None], out: Tensor) -> None:
        kernels.trimmed_mean(rows, self.trim_number, out)

    def __repr__(self) -> str:
        return f"TrimmedMean(trim_number={self.trim_number})"
