"""PCGrad as a method on the Gram matrix, in every published variant."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import variants
from ..backends import kernels
from ..variants import Generator
from .base import Method, Projections, Solution
from .solvers.problems import check_gram


class PCGrad(Method):
    """Project each task gradient away from those it conflicts with, then sum or average.

    Args:
        variant: paper, pytorch-pcgrad, tensorflow, torchjd, libmtl or tensorlogic; cagrad, tensor2robot, samsunglabs or
            libmtl-1.1.5. See docs/variants.md.
        reduction: ``sum`` or ``mean``; None: the variant's own.
        generator: a ``torch.Generator`` (CPU), ``random.Random``, ``numpy.random.Generator`` or
            ``numpy.random.RandomState`` for the order of the projections. None: the global generator of the variant's
            original, or NumPy's without a seed where it has one of its own.
        order: of the projections: ``fixed``, 0..T-1; ``once``, one permutation for all tasks; ``fresh``, a new one for
            each; ``cumulative``, one list, shuffled again for each; ``others``, see ``variants.Variant``. None: the
            variant's own.
        eps, norm_eps: a projection divides by (‖g_j‖ + norm_eps)² + eps; None: the variant's own, 0 for most. Absolute
            ones stop surgery between short gradients. norm_eps goes with paper, torchjd and cagrad alone.
    Raises:
        TypeError: a generator of another type.
        ValueError: unknown variant, reduction or order; ``others`` with self-projection; eps out of range or norm_eps
            with another variant.
    Source: Yu et al. 2020, arXiv:2001.06782, Alg. 1. Oracle: ``reference.merge``.
    Example:
        >>> G = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.PCGrad().weights(G)
        tensor([2.0000, 1.5000], dtype=torch.float64)
    """

    def __init__(
        self,
        variant: str = "paper",
        reduction: Literal["sum", "mean"] | None = None,
        generator: Generator | None = None,
        order: variants.Order | None = None,
        *,
        eps: float | None = None,
        norm_eps: float | None = None,
    ) -> None:
        self.variant = variants.get(variant).guarded(eps, norm_eps)
        self._changes = {"order": order, "eps": eps, "norm_eps": norm_eps}
        if order is not None:
            self.variant = self.variant.ordered(order)
        if reduction not in ("sum", "mean", None):
            raise ValueError(f"reduction must be 'sum', 'mean' or None; found {reduction!r}")
        variants.check_generator(generator)
        self.reduction = reduction or self.variant.reduction
        self.generator = generator
        self.scope = self.variant.scope

    def coefficients(self, gram: Tensor) -> Tensor:
        """C such that the projected gradient of task i is Σ_k C_ik g_k; draws a new order.

        Args:
            gram: ``[T, T]`` or ``[S, T, T]`` float64.
        Returns:
            float64 of the same shape.
        """
        check_gram(gram)
        count = gram.shape[0] if gram.dim() == 3 else None
        order = kernels.orders(self.variant, gram.shape[-1], count, self.generator, gram.device)
        # Not through functional, which would look whether the order is one.
        return kernels.pcgrad_coefficients(self.variant.denominators(gram), order, *self.variant.guards)

    def solve(self, gram: Tensor) -> Solution:
        coefficients = self.coefficients(gram)
        weights = coefficients.sum(dim=-2)
        if self.reduction == "mean":
            weights /= gram.shape[-1]
        return Solution(weights, coefficients)

    def projections(self, tasks: int, device: torch.device) -> Projections | None:
        variant = self.variant
        if variant.norm_eps:  # the kernel makes G itself
            return None
        order = kernels.orders(variant, tasks, None, self.generator, device)
        return Projections(order, variant.guards, self.scale(tasks))

    def scale(self, tasks: int) -> float:
        """Of the sum of the projected gradients."""
        return 1.0 / tasks if self.reduction == "mean" else 1.0

    def partial_weights(self, weights: Tensor) -> Tensor:
        averaged = self.reduction == "mean" and self.variant.partial_sum
        return weights * weights.shape[-1] if averaged else weights

    def __repr__(self) -> str:
        changes = "".join(f", {name}={value!r}" for name, value in self._changes.items() if value is not None)
        return f"PCGrad(variant={self.variant.name!r}, reduction={self.reduction!r}{changes})"
