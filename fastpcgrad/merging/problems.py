"""Which parameters form which problem, and whose weights each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import compress

import torch
from torch import Tensor

from ..methods import Method
from ..rows.parameters import UNDIVIDED, Division

SUMMED = -1
"""In the place of a problem's number: of a parameter that is in none, and whose gradients are summed."""

WHOLE, PARTIAL, SUM = range(3)
"""The rows of ``weights_table`` where there is one problem."""


def weights_table(method: Method, weights: Tensor) -> Tensor:
    """All weights that a parameter may take: those of each problem, those of parameters that some task does not have,
    and ones for a sum.

    Args:
        weights: w, ``[T]``, or ``[S, T]`` of several problems.
    Returns:
        ``[2 S + 1, T]``, see ``Problems.row_of_each``.
    """
    each = weights.reshape(-1, weights.shape[-1])
    return torch.cat([each, method.partial_weights(each), each.new_ones(1, each.shape[1])])


def check_scopes(method: Method, gram_over: object) -> None:
    """ValueError where G is to look at some of the parameters alone, and the method has no such G."""
    if gram_over is None:
        return
    if method.needs_rows:
        raise ValueError(f"gram_over needs a method that makes weights of G; found {method!r}, which needs the rows")
    if method.scope == "parameter":
        raise ValueError(
            f"gram_over needs a method with one G for several parameters; found {method!r}, which has one for each: "
            "choose another variant"
        )


@dataclass(frozen=True)
class Problems:
    """S problems, each with a Gram matrix and weights of its own.

    Attributes:
        of: for each parameter the number of its problem, 0..S-1, or ``SUMMED``.
        whole: for each parameter whether every task has a gradient of it.
        count: S; 1 where there is one for all, even if all are summed.
        are_many: whether figures are those of each problem, ``[S, ...]``, also where S = 1.
        names: one for each problem; empty where they have none.
        gram_over: for each parameter whether its problem's Gram matrix looks at it; None: at all that are in one.
        known_by: what each problem is known by in later steps, too, when parameters were frozen or added: its name, or
            the number of its group.
    """

    of: list[int]
    whole: Sequence[bool]
    count: int
    are_many: bool
    names: Sequence[str] = ()
    gram_over: Sequence[bool] | None = None
    known_by: Sequence[int | str] = ()

    @classmethod
    def made(cls, method: Method, whole: Sequence[bool], division: Division = UNDIVIDED) -> Problems:
        """As the caller divides the parameters, and where nothing is said as the method's ``scope`` does.

        Raises:
            ValueError: see ``check_scopes``.
        """
        shared: Sequence[bool] | None
        shared, groups, names, gram_over = division
        check_scopes(method, gram_over)
        count = len(whole)
        if shared is groups is gram_over is None and method.scope != "parameter" and all(whole):
            return _one_for_all(count)
        if shared is None:
            shared = whole if method.scope == "shared" else [True] * count
        if method.scope == "parameter":
            groups, names = list(range(count)), names if len(names) == count else ()
        if groups is None:
            return cls([0 if inside else SUMMED for inside in shared], whole, 1, False, gram_over=gram_over)
        numbers = {group: n for n, group in enumerate(sorted(set(compress(groups, shared))))}
        of = [numbers[group] if inside else SUMMED for group, inside in zip(groups, shared, strict=True)]
        named = [names[group] for group in numbers] if names else ()
        return cls(of, whole, len(numbers), True, named, gram_over, named or list(numbers))

    @cached_property
    def is_one_for_all(self) -> bool:
        """Whether every parameter takes the same weights, made of a Gram matrix of them all."""
        return not self.are_many and all(self.whole) and self.gram_over is None and SUMMED not in self.of

    @cached_property
    def in_gram(self) -> list[int]:
        """For each parameter the number of the problem whose Gram matrix looks at it, or ``SUMMED``."""
        if self.gram_over is None:
            return self.of
        return [p if seen else SUMMED for p, seen in zip(self.of, self.gram_over, strict=True)]

    @cached_property
    def row_of_each(self) -> list[int]:
        """For each parameter its row of ``weights_table``."""
        return [
            2 * self.count if p == SUMMED else p if whole else self.count + p
            for p, whole in zip(self.of, self.whole, strict=True)
        ]


@cache
def _one_for_all(count: int) -> Problems:
    return Problems([0] * count, [True] * count, 1, are_many=False)
