"""Methods as aggregators and weightings of TorchJD."""

from __future__ import annotations

import torch
from torch import Tensor
from torchjd import aggregation

from .. import functional
from ..methods import Elementwise, Method, PCGrad, Tracking, check_method


class Weighting(aggregation.Weighting):
    """A method as a ``Weighting`` of TorchJD, for its ``autogram.Engine``: Gram matrix in, weights out.

    Args:
        method: any that works on the Gram matrix; None: ``methods.PCGrad()``. All that it is given is one problem,
            whatever its ``scope``.
    Raises:
        TypeError: no method, or one that needs the task gradients themselves; see ``Aggregator``.
        When called: ValueError for what is no ``[T, T]``.
    Numerics: weights of the Gram matrix in float64, rounded to its dtype. There is no derivative.
    Example:
        weighting = Weighting(methods.UPGrad())
        losses.backward(weighting(engine.compute_gramian(losses)))
    """

    def __init__(self, method: Method | None = None) -> None:
        super().__init__()
        self.method = check_method(method, PCGrad)
        if isinstance(self.method, Tracking):
            raise TypeError(
                f"{self.method!r} keeps something of each column: use it in GradientSurgery, not in TorchJD"
            )
        if isinstance(self.method, Elementwise):
            raise TypeError(f"{type(self.method).__name__} has no weights: TorchJD can have it as an Aggregator only")

    @torch.no_grad()
    def forward(self, gramian: Tensor) -> Tensor:
        if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1]:
            raise ValueError(f"the Gram matrix must be [T, T]; found {list(gramian.shape)}")
        return self.method.checked_solve(gramian.double(), range(len(gramian))).weights.to(gramian.dtype)

    def __repr__(self) -> str:
        return f"Weighting({self.method!r})"


class _OfGram(aggregation.GramianWeightedAggregator):
    """Weights of the Gram matrix, times the rows: one pass of ours over J for each."""

    def __init__(self, method: Method | None) -> None:
        super().__init__(Weighting(method))
        self.weighting = self.gramian_weighting << functional.gram

    @torch.no_grad()
    def forward(self, matrix: Tensor) -> Tensor:
        matrix = matrix.contiguous()
        return functional.combine(matrix, self.weighting(matrix).double())

    def __repr__(self) -> str:
        return f"Aggregator({self.gramian_weighting.method!r})"


class _OfColumns(aggregation.Aggregator):
    """A method that works on each column of J."""

    def __init__(self, method: Elementwise) -> None:
        super().__init__()
        self.method = method

    @torch.no_grad()
    def forward(self, matrix: Tensor) -> Tensor:
        return self.method.aggregate(matrix)

    def __repr__(self) -> str:
        return f"Aggregator({self.method!r})"


def Aggregator(method: Method | None = None) -> aggregation.Aggregator:
    """A method as an ``Aggregator`` of TorchJD: for ``jac_to_grad``, after ``backward`` or ``mtl_backward``.

    Args:
        method: any; None: ``methods.PCGrad()``. All parameters in one call are one problem, whatever its ``scope``.
    Returns:
        ``[T, N]`` → ``[N]``. Of a method that works on the Gram matrix a ``GramianWeightedAggregator``: ``jac_to_grad``
        then returns the weights (float64), and takes ``optimize_gramian_computation=True``, with which the Gram matrix
        is TorchJD's, in the dtype of the Jacobians.
    Raises:
        TypeError: no method.
        When called: ValueError for what is no matrix or has no rows; TypeError for another dtype than fp16/bf16/fp32/
            fp64.
    Numerics: see ``gram`` and ``combine``. There is no derivative.
    Example:
        torchjd.autojac.backward(losses)
        torchjd.autojac.jac_to_grad(model.parameters(), Aggregator(methods.UPGrad()))
    """
    return _OfColumns(method) if isinstance(method, Elementwise) else _OfGram(method)
