"""What the last surgery saw and did: norms, conflicts, weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._ops import Figures, Later


class ConflictReport:
    """How the task gradients of one surgery conflicted and what was made of them.

    Every figure is a tensor on the device of the gradients, computed from T×T matrices when it is first read; only
    ``as_dict`` and ``repr`` wait for the device. T counts the tasks that were there.

    Args:
        tasks: the index of each task that was there, ascending.
        figures: gives G, w and C; called when one of them is first read.
    """

    def __init__(self, tasks: Sequence[int], figures: Later) -> None:
        self.tasks = tasks
        self._later = figures

    @cached_property
    def _figures(self) -> Figures:
        return self._later()

    @property
    def gram(self) -> Tensor:
        """G, ``[T, T]`` float64, over all parameters that underwent surgery."""
        return self._figures.gram

    @property
    def weights(self) -> Tensor:
        """w, ``[T]`` float64, or ``[S, T]`` where S problems were solved (one a group or parameter)."""
        return self._figures.weights

    @property
    def coefficients(self) -> Tensor | None:
        """C, ``[T, T]`` or ``[S, T, T]`` float64, where the method has them."""
        return self._figures.coefficients

    @property
    def segment_grams(self) -> Tensor | None:
        """G of each problem, ``[S, T, T]`` float64, where S problems were solved, else None."""
        return self._figures.segment_grams

    @cached_property
    def norms(self) -> Tensor:
        """Norm of each task gradient: ``[T]`` float64."""
        return self.gram.diagonal().sqrt()

    @cached_property
    def cosines(self) -> Tensor:
        """Cosine similarity of each pair of task gradients: ``[T, T]`` float64; 0 with a zero gradient."""
        scale = torch.where(self.norms > 0, self.norms, 1.0)
        return self.gram / scale[:, None] / scale

    @cached_property
    def pair_cosines(self) -> Tensor:
        """The cosines of the T (T − 1) / 2 pairs i < j."""
        count = len(self.tasks)
        rows, columns = torch.triu_indices(count, count, offset=1, device=self.gram.device)
        return self.cosines[rows, columns]

    @cached_property
    def conflict_rate(self) -> Tensor:
        """Fraction of pairs with a negative dot product, a 0-dim tensor; 0 for a single task."""
        pairs = self.pair_cosines
        return (pairs < 0).double().mean() if len(pairs) else pairs.new_zeros(())

    @cached_property
    def removed_fraction(self) -> Tensor:
        """How much shorter each task gradient became, 1 − ‖g_i'‖/‖g_i‖: ``[T]``; NaN where no C is known."""
        if self.coefficients is None:
            return torch.full_like(self.norms, torch.nan)
        gram = self.gram if self.segment_grams is None else self.segment_grams
        squared = (self.coefficients @ gram * self.coefficients).sum(dim=-1)
        squared = squared if squared.dim() == 1 else squared.sum(dim=0)
        kept = squared.clamp_min(0).sqrt() / torch.where(self.norms > 0, self.norms, 1.0)
        return torch.where(self.norms > 0, 1 - kept, 0.0)

    def as_dict(self, names: Sequence[str] | None = None, prefix: str = "surgery/") -> dict[str, float]:
        """Figures for a logger, with one copy to the host.

        Args:
            names: of all tasks, by task index; None: the indices.
            prefix: put before each key.
        Returns:
            ``conflict_rate``, ``cos_min``, ``cos_mean`` (NaN for a single task) and for each task ``grad_norm/…``,
            ``weight/…`` (the mean over S problems) and ``removed_frac/…``.
        """
        if names is not None and len(names) <= max(self.tasks):
            raise ValueError(f"names must name all tasks up to {max(self.tasks)}; found {len(names)} names")
        pairs = self.pair_cosines
        nothing = pairs.new_full((1,), torch.nan)
        weights = self.weights if self.weights.dim() == 1 else self.weights.mean(dim=0)
        heads = torch.stack(
            [self.conflict_rate, pairs.min() if len(pairs) else nothing[0], pairs.mean() if len(pairs) else nothing[0]]
        )
        values = torch.cat([heads, self.norms, weights, self.removed_fraction]).tolist()
        labels = [str(t) if names is None else names[t] for t in self.tasks]
        keys = ["conflict_rate", "cos_min", "cos_mean"]
        keys += [f"{kind}/{label}" for kind in ("grad_norm", "weight", "removed_frac") for label in labels]
        return {prefix + key: value for key, value in zip(keys, values, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        figures = self._figures  # whatever gives them stays behind
        return {**{name: value for name, value in self.__dict__.items() if name != "_later"}, "_figures": figures}

    def __repr__(self) -> str:
        figures = ", ".join(f"{key}={value:.4g}" for key, value in self.as_dict(prefix="").items())
        return f"ConflictReport(tasks={list(self.tasks)}, {figures})"
