"""What a Gram-based method is: G in, weights out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .. import functional


class Solution(NamedTuple):
    """What a method made of a Gram matrix.

    Attributes:
        weights: w, ``[..., T]`` float64; the merged gradient is w J.
        coefficients: C, ``[..., T, T]`` float64, where the method has a gradient g_i' = C_i J for each task.
    """

    weights: Tensor
    coefficients: Tensor | None


def check_method(method: Method | None, default: Callable[[], Method]) -> Method:
    """``method``, or the default for None; TypeError for anything that is no ``Method``."""
    if method is None:
        return default()
    if not isinstance(method, Method):
        raise TypeError(f"method must be a fastpcgrad.methods.Method or None; found {method!r}")
    return method


class Method(ABC):
    """A rule that looks at the task gradients only through their Gram matrix.

    A subclass gives ``solve``. It may keep state, which goes through ``state_dict``.
    """

    scope: Literal["all", "shared", "parameter"] = "all"
    """What one problem spans where the caller does not say: see ``variants.Variant``."""

    @abstractmethod
    def solve(self, gram: Tensor) -> Solution:
        """Weights for G.

        Args:
            gram: ``[T, T]`` float64, or ``[S, T, T]``: S independent problems.
        Returns:
            weights ``[T]`` or ``[S, T]``, float64, on the device of ``gram``.
        """

    def merge(self, rows: Tensor, out: Tensor) -> tuple[Tensor, Solution]:
        """The whole surgery on J ``[T, N]``, one problem over all columns; a fused kernel may serve it.

        Args:
            rows: task gradients, see ``fastpcgrad.gram``.
            out: ``[N]``, receives the merged gradient; may be one of the rows.
        Returns:
            G and what ``solve`` made of it.
        """
        gram = functional.gram(rows)
        solution = self.solve(gram)
        functional.combine(rows, solution.weights, out)
        return gram, solution

    def weights(self, gram: Tensor) -> Tensor:
        """w such that the merged gradient is w J: ``[T]``, or ``[S, T]``, float64. See ``solve``."""
        return self.solve(gram).weights

    def partial_weights(self, weights: Tensor) -> Tensor:
        """Weights for parameters that only some of the tasks touch, from those for all (the same unless said)."""
        return weights

    def state_dict(self) -> dict[str, Any]:
        """State to resume from; empty for a method without."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` gave.

        Raises:
            ValueError: keys that this method does not have.
        """
        if state:
            raise ValueError(f"{type(self).__name__} has no state; found keys {sorted(state)}")
