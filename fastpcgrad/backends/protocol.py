"""What a backend is: the functions that its module has, on inputs that ``functional`` has validated.

Shapes: J is ``[T, N]``, G and C ``[T, T]``, w ``[T]``, with S segments ``[S, T, T]`` and ``[S, T]``; all but J float64.
An order may lie in the host's memory, wherever the rest does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .._blocks import Blocks
from .._ops import Later
from ..variants import Guards


class BlockFunctions(Protocol):
    """On task gradients that lie where autograd put them, and on G."""

    def gram_blocks(self, blocks: Blocks, problem_of: Sequence[int] | None, problems: int, /) -> Tensor:
        """G of each problem, ``[problems, T, T]``; block b counts for ``problem_of[b]``, -1: none; None: 0 for all."""

    def combine_blocks(
        self, blocks: Blocks, weights: Tensor, weights_of: Sequence[int] | None, out: Sequence[Tensor | None], /
    ) -> None:
        """Each block combined with its row of ``weights`` ``[count, T]``, 0 for None, into ``out[b]``, which may be a
        row of it."""

    def pcgrad_blocks(
        self, blocks: Blocks, order: Tensor, guards: Guards, scale: float, out: Sequence[Tensor | None], /
    ) -> Later:
        """G, C and w = scale · (column sums of C) of one problem over all blocks, and w J in ``out``."""

    def sign_sums(self, rows: Sequence[Tensor | None], weights: Sequence[float] | None, sums: Tensor, /) -> None:
        """Σ_t w_t max(g_t, 0) and Σ_t w_t min(g_t, 0) of each column, w_t = 1 for None; NaN is in one of them.

        Args:
            rows: T rows ``[n]``; None: zeros.
            sums: where both go, ``[2, n]`` dense, fp64 for fp64 rows, else fp32.
        """

    def trimmed_mean(self, rows: Sequence[Tensor | None], trim: int, out: Tensor, /) -> None:
        """The mean of each column without its ``trim`` largest and smallest entries, NaN where one is not finite.

        Args:
            rows: T rows ``[n]``, T > 2 trim; None: zeros.
            out: ``[n]``; may be one of the rows.
        """

    def method_weights(
        self, name: str, gram: Tensor, parameters: Sequence[float], preference: Tensor | None, /
    ) -> Tensor | None:
        """A method's solver, see ``abi.SOLVERS``: its answers ``[T]`` or ``[S, T]``; None where there is none, or
        another takes less time."""

    def gradvac(self, gram: Tensor, places: Tensor, beta: float, eps: float, targets: Tensor, /) -> Tensor | None:
        """GradVac's C; None where there is none. ``targets`` are updated in place."""


class Backend(BlockFunctions, Protocol):
    """All functions."""

    __name__: str
    LARGEST_TASKS: int
    """Above it ``eager`` is asked instead."""

    def why_unavailable(self, device_type: str, /) -> str | None:
        """None where it can run tensors of that device, else the reason."""

    def gram(self, grads: Tensor, segments: Tensor | None, /) -> Tensor: ...

    def pcgrad_coefficients(self, gram: Tensor, order: Tensor, guards: Guards, /) -> Tensor:
        """C of the sequential projections; one order for all problems, or one each."""

    def combine(self, grads: Tensor, weights: Tensor, segments: Tensor | None, out: Tensor, /) -> None:
        """out = w J; ``out`` may be a row of J."""

    def mix_(self, grads: Tensor, coefficients: Tensor, segments: Tensor | None, /) -> None:
        """J ← C J in place."""

    def pcgrad(
        self,
        grads: Tensor,
        order: Tensor,
        guards: Guards,
        scale: float,
        segments: Tensor | None,
        out: Tensor,
        figures: bool = True,
        /,
    ) -> tuple[Tensor, ...]:
        """out = w J with w = scale · (column sums of C); gives G, C and w, or nothing without ``figures``: then these
        may lie in the workspace."""

    def pcgrad_(
        self, grads: Tensor, order: Tensor, guards: Guards, segments: Tensor | None, figures: bool = True, /
    ) -> tuple[Tensor, ...]:
        """J ← C J in place; gives G and C, or nothing."""

    def workspace_nbytes(self, tasks: int, widths: Sequence[int], dtype: torch.dtype, problems: int, /) -> int:
        """The most bytes that its functions on blocks of these widths take for themselves."""
