"""What the last surgery saw and did: norms, conflicts, weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._ops import Figures, Later
from .._tasks import TaskNames
from ..rows.choice import RowsReport
from . import conflict_maps

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class ConflictReport:
    """How the task gradients of one surgery conflicted and what was made of them.

    Every figure is a tensor on the device of the gradients, computed from T×T matrices when it is first read; only
    ``as_dict`` and ``repr`` wait for the device. T counts the tasks that were there.

    Args:
        tasks: the index of each task that was there, ascending.
        figures: gives G, w and C; called when one of them is first read.
        layers: the names of the S problems that were solved; empty where they have none.
    Attributes:
        names: of all tasks of the surgery, by index; empty where they have none.
        rows: which task gradients were kept as factors, and why others were not.
    """

    names: TaskNames = ()
    rows = RowsReport()

    def __init__(self, tasks: Sequence[int], figures: Later, layers: Sequence[str] = ()) -> None:
        self.tasks, self.layers = tasks, layers
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
        return cosines_of(self.gram)

    @cached_property
    def segment_cosines(self) -> Tensor | None:
        """Those within each problem: ``[S, T, T]`` float64, where S problems were solved, else None."""
        return None if self.segment_grams is None else cosines_of(self.segment_grams)

    @cached_property
    def cosines_to_mean(self) -> Tensor:
        """Cosine similarity of each task gradient to the mean of all: ``[T]`` float64; 0 with a zero gradient."""
        lengths = self.norms * self.gram.sum().clamp_min(0).sqrt()
        return self.gram.sum(dim=1) / torch.where(lengths > 0, lengths, 1.0)

    @cached_property
    def pair_cosines(self) -> Tensor:
        """The cosines of the T (T − 1) / 2 pairs i < j."""
        return of_pairs(self.cosines)

    @cached_property
    def conflict_rate(self) -> Tensor:
        """Fraction of pairs with a negative dot product, a 0-dim tensor; 0 for a single task."""
        return conflicting(self.pair_cosines)

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
            names: of all tasks, by task index; None: those of the surgery, or the indices.
            prefix: put before each key.
        Returns:
            ``conflict_rate``, ``cos_min`` and ``cos_mean``; for each task ``grad_norm/…``, ``cos_to_mean/…``,
            ``weight/…`` (the mean over S problems) and ``removed_frac/…``; for each pair ``cos/…-…``; for each layer
            that has a name ``conflict_rate/…``. What there is none of is left out: cosines of pairs where there is a
            single task, ``removed_frac`` where no C is known, weights of a method that has none. A NaN is one of the
            gradients.
        """
        names = self._names(names)
        pairs, several = self.pair_cosines, len(self.tasks) > 1
        weights = self.weights if self.weights.dim() == 1 else self.weights.mean(dim=0)
        found: list[tuple[Sequence[str], Tensor]] = [(["conflict_rate"], self.conflict_rate[None])]
        if several:
            found += [(["cos_min", "cos_mean"], torch.stack([pairs.min(), pairs.mean()]))]
        of_tasks = [("grad_norm", self.norms), ("cos_to_mean", self.cosines_to_mean), ("weight", weights)]
        if self.coefficients is not None:
            of_tasks += [("removed_frac", self.removed_fraction)]
        found += [([f"{kind}/{name}" for name in names], values) for kind, values in of_tasks]
        found += [([f"cos/{a}-{b}" for a, b in conflict_maps.pairs_of(names)], pairs)]
        if self.layers and several and self.segment_cosines is not None:
            rates = conflicting(of_pairs(self.segment_cosines))
            found += [([f"conflict_rate/{layer}" for layer in self.layers], rates)]
        keys = [key for own, _ in found for key in own]
        figures = dict(zip(keys, torch.cat([values for _, values in found]).tolist(), strict=True))
        if all(math.isfinite(figures[f"grad_norm/{name}"]) for name in names):  # a NaN stands for what is not there
            figures = {key: value for key, value in figures.items() if not math.isnan(value)}
        return {prefix + key: value for key, value in figures.items()}

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each pair of tasks, over all parameters (layer ``""``) and in each problem: its dot product and
        cosine, and whether it conflicts. Needs pandas.
        """
        layers, cosines = self._by_layer()
        grams = self.gram[None] if self.segment_grams is None else torch.cat([self.gram[None], self.segment_grams])
        values = {"product": of_pairs(grams), "cosine": of_pairs(cosines), "conflict": of_pairs(cosines) < 0}
        return conflict_maps.table(self._names(None), layers, values)

    def plot(self) -> Figure:
        """A map of the cosines: task × task over all parameters, and pair × layer where several problems were solved.
        Needs matplotlib; give the figure to a logger, or ``savefig`` it.
        """
        layers, cosines = self._by_layer()
        return conflict_maps.draw(self._names(None), layers, cosines.cpu(), title="Task gradients of one step")

    def _by_layer(self) -> tuple[list[str], Tensor]:
        """All parameters and then each problem: their names, and the cosines there."""
        each = self.segment_cosines
        if each is None:
            return [""], self.cosines[None]
        return ["", *(self.layers or map(str, range(len(each))))], torch.cat([self.cosines[None], each])

    def _names(self, given: Sequence[str] | None) -> list[str]:
        """Of the tasks that were there."""
        names = self.names if given is None else given
        if given is not None and len(names) <= max(self.tasks):
            raise ValueError(f"names must name all tasks up to {max(self.tasks)}; found {len(names)} names")
        return [names[t] if names else str(t) for t in self.tasks]

    def __getstate__(self) -> dict[str, Any]:
        figures = self._figures  # whatever gives them stays behind
        return {**{name: value for name, value in self.__dict__.items() if name != "_later"}, "_figures": figures}

    def __repr__(self) -> str:
        shown = ("conflict_rate", "cos_min", "cos_mean", "grad_norm/", "weight/", "removed_frac/")
        figures = {key: value for key, value in self.as_dict(prefix="").items() if not key.startswith("conflict_rate/")}
        text = ", ".join(f"{key}={value:.4g}" for key, value in figures.items() if key.startswith(shown))
        return f"ConflictReport(tasks={self._names(None) if self.names else list(self.tasks)}, {text})"


def cosines_of(grams: Tensor) -> Tensor:
    """The cosines of G, ``[..., T, T]``; 0 with a zero gradient."""
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(norms > 0, norms, 1.0)
    return grams / scale[..., :, None] / scale[..., None, :]


def of_pairs(matrices: Tensor) -> Tensor:
    """What stands above the diagonals, ``[..., T (T − 1) / 2]``."""
    count = matrices.shape[-1]
    rows, columns = torch.triu_indices(count, count, offset=1, device=matrices.device)
    return matrices[..., rows, columns]


def conflicting(pairs: Tensor) -> Tensor:
    """The fraction that is negative, ``[...]``; 0 of none."""
    return (pairs < 0).double().mean(dim=-1) if pairs.shape[-1] else pairs.new_zeros(pairs.shape[:-1])
