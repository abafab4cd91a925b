"""What a Gram-based method is: G in, weights out."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..variants import Generator, Guards


class Solution(NamedTuple):
    """What a method made of a Gram matrix.

    Attributes:
        weights: w, ``[..., T]`` float64; the merged gradient is w J.
        coefficients: C, ``[..., T, T]`` float64, where the method has a gradient g_i' = C_i J for each task.
    """

    weights: Tensor
    coefficients: Tensor | None


class Projections(NamedTuple):
    """One run of PCGrad's sequential projections.

    Attributes:
        order: ``[T, T]`` int64 on the device of the rows or in the host's memory, drawn for this run; see
            ``functional.pcgrad_coefficients``.
        guards: when one gradient is projected away from another.
        scale: of the sum of the projected gradients.
    """

    order: Tensor
    guards: Guards
    scale: float


def check_method(method: Method | None, default: Callable[[], Method]) -> Method:
    """``method``, or the default for None; TypeError for anything that is no ``Method``."""
    if method is None:
        return default()
    if not isinstance(method, Method):
        raise TypeError(f"method must be a fastpcgrad.methods.Method or None; found {method!r}")
    return method


class Method(ABC):
    """A rule that looks at the task gradients only through their Gram matrix.

    A subclass gives ``solve``. It may keep state, which goes through ``state_dict``; one that keeps something for each
    task gives ``solve_for`` too.
    """

    scope: Literal["all", "shared", "parameter"] = "all"
    """What one problem spans where the caller does not say: see ``variants.Variant``."""
    needs_rows: bool = False
    """Whether G is not enough for it, but the rows must be there as they are."""
    needs_losses: bool = False
    """Whether ``Tracking.track`` needs the values of the losses."""
    generator: Generator | None = None
    """What it draws from; None: nothing, or a global generator."""

    _problems: Sequence[Hashable] | None = None
    _parameters: Sequence[weakref.ref[Tensor] | None] = ()
    """Those of the last step, as far as they are known, where something is kept of each."""

    @property
    def known_tasks(self) -> int:
        """How many tasks it keeps something for, each by its index."""
        return 0

    @abstractmethod
    def solve(self, gram: Tensor) -> Solution:
        """Weights for G.

        Args:
            gram: ``[T, T]`` float64, or ``[S, T, T]``: S independent problems.
        Returns:
            weights ``[T]`` or ``[S, T]``, float64, on the device of ``gram``.
        """

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        """``solve`` where tasks may be absent: row t of G belongs to task ``tasks[t]``.

        Surgeries call this one. A method that keeps something for each task must tell them apart by their index.

        Args:
            gram: see ``solve``.
            tasks: the index of each task that is there, ascending.
        """
        return self.solve(gram)

    def projections(self, tasks: int, device: torch.device) -> Projections | None:
        """PCGrad's projections of that many tasks, which one kernel does from G to the merged gradient, instead of
        ``solve_for``; None for what is no PCGrad."""
        return None

    def checked_solve(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        """``solve_for``; ValueError where the weights have another shape or dtype than they must."""
        solution = self.solve_for(gram, tasks)
        expected, found = gram.shape[:-1], solution.weights
        if found.shape != expected or found.dtype != gram.dtype:
            raise ValueError(
                f"{type(self).__name__} must give weights {list(expected)} of {gram.dtype}; "
                f"found {list(found.shape)} of {found.dtype}"
            )
        return solution

    @contextmanager
    def solving(self, known_by: Sequence[Hashable], parameters: Sequence[Tensor] = ()) -> Iterator[None]:
        """Within, several problems are solved; ValueError where what it keeps is of others, as where parameters were
        frozen or added since.

        Args:
            known_by: the names of the problems, or numbers that stay, in their order.
            parameters: where each is a problem by itself, these.
        """
        before = self._problems
        are_others = before not in (None, known_by) or self.knows_others(parameters)
        if are_others and self._reuses_state():
            raise ValueError(
                f"{type(self).__name__} keeps something of each of {_shown(before or ())}; found {_shown(known_by)}"
                f"{', of other parameters or in another order' if before == known_by else ''}: train the same "
                "parameters in every step, or call reset() when they change"
            )
        yield
        self._problems, self._parameters = known_by, known_parameters(parameters)

    def forget_problems(self) -> None:
        """Of a state that was taken up: whose it is shows in the next step."""
        self._problems, self._parameters = None, ()

    def knows_others(self, parameters: Sequence[Tensor]) -> bool:
        """Whether some of the parameters are known to be others than those of the last step, place by place."""
        return any(_are_others(old, new) for old, new in zip(self._parameters, parameters, strict=False))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parameters": ()}  # a copy's are others

    def _reuses_state(self) -> bool:
        """Whether there is something of earlier steps that the next one depends on."""
        return any(isinstance(kept, Tensor) for kept in self.state_dict().values())

    def weights(self, gram: Tensor) -> Tensor:
        """w such that the merged gradient is w J: ``[T]``, or ``[S, T]``, float64. See ``solve``."""
        return self.solve(gram).weights

    def partial_weights(self, weights: Tensor) -> Tensor:
        """Weights for parameters that only some of the tasks touch, from those for all (the same unless said)."""
        return weights

    def reset(self) -> None:  # noqa: B027 (a method without state has nothing to forget)
        """Forget what it keeps."""

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


def known_parameters(parameters: Sequence[Tensor]) -> list[weakref.ref[Tensor] | None]:
    """By what they are known in later steps; of tensors that are no ``Parameter`` there may be new ones in each."""
    return [weakref.ref(p) if isinstance(p, torch.nn.Parameter) else None for p in parameters]


def _are_others(old: weakref.ref[Tensor] | None, new: Tensor) -> bool:
    """Whether two parameters are known to be different ones."""
    before = None if old is None else old()
    return before is not None and isinstance(new, torch.nn.Parameter) and before is not new


def _shown(problems: Sequence[Hashable]) -> str:
    named = ", ".join(map(str, problems[:8])) + ", ..." * (len(problems) > 8)
    return f"{len(problems)} problems ({named})"
